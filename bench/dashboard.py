"""How quickly the dashboard of a deployment with many runs opens and follows, in a real browser and beside others.

Runs are written straight through the public API: each with a series of logged points. Page load is measured in headless
Chromium from the request to the first row or curve on the screen; update latency from the call of `log_metrics` to the
moment at which the curve has the point. Meanwhile more viewers look at the same pages, as sockets without a browser.
"""

import argparse
import asyncio
import re
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import socketio
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service

from bench.foundation import started
from tests.support.cluster import Cluster
from treadle import ServiceClient

Row = dict[str, str]
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage")
QUIET = ("--disable-background-networking", "--disable-component-update", "--disable-sync")
_LAST_STEP = """
const found = document.querySelector("[data-chart='reward']");
const chart = found && getElement(parseInt(found.id.slice(1))).chart;
const data = chart && chart.getOption().series[0].data;
return data && data.length ? data[data.length - 1][0] : -1;
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's options."""
    parser.add_argument("--runs", type=int, default=100, help="runs of the tenant")
    parser.add_argument("--points", type=int, default=1000, help="points of each run's curve")
    parser.add_argument("--viewers", type=int, default=5, help="browsers that look at the same pages meanwhile")
    parser.add_argument("--tries", type=int, default=10, help="page loads, and updates, of each kind")


def run(options: argparse.Namespace) -> list[Row]:
    """Measures and returns the rows."""
    with tempfile.TemporaryDirectory() as folder, started(Path(folder), "pip") as (cluster, _):
        key = cluster.new_tenant()
        with ServiceClient(cluster.gateway_address, key) as service:
            base = service.get_server_capabilities().supported_models[0].model_name
            clients = [
                service.create_lora_training_client(base, rank=4, user_metadata={"name": f"run {number}"})
                for number in range(options.runs)
            ]
            for client in clients:
                logged = [client.log_metrics(step, {"reward": step / 100}) for step in range(options.points)]
                logged[-1].result()
            chrome = _browser(Path(folder), cluster, key)
            try:
                return _measure(options, cluster, key, chrome, clients[-1])
            finally:
                chrome.quit()


def _measure(options: argparse.Namespace, cluster: Cluster, key: str, chrome: Chrome, client: Any) -> list[Row]:
    address = f"http://{cluster.http_address}"
    _, tenant, _, name = client.run.split("/")
    pages = {"the list of runs": "/", "one run": f"/runs/{tenant}/{name}"}
    shown = {
        "the list of runs": lambda: len(chrome.find_elements("css selector", ".runs tbody tr")) >= 50,
        "one run": lambda: chrome.execute_script(_LAST_STEP) >= 0,
    }
    gateway = psutil.Process(cluster.processes["gateway"].pid)
    rows: list[Row] = []
    for condition in ("one viewer", f"{options.viewers} more"):
        others = 0 if condition == "one viewer" else options.viewers
        with _Viewers(address, key, list(pages.values()), others):
            for page, path in pages.items():
                took = [_load(chrome, address + path, shown[page]) for _ in range(options.tries)]
                rows.append(_row(f"{page}, {options.runs} runs: on the screen, {condition}, ms", took, 1000))
            updates = [_update(chrome, client, options.points + step + 1000 * others) for step in range(options.tries)]
            rows.append(_row(f"a logged point: in the curve, {condition}, ms", updates, 1000))
            before, began = sum(gateway.cpu_times()[:2]), time.monotonic()
            pings = _pings(address, 5.0)
            share = (sum(gateway.cpu_times()[:2]) - before) / (time.monotonic() - began)
            rows.append({"figure": f"gateway's CPU while they look, {condition}", "value": f"{share:.2f} of a core"})
            rows.append(_row(f"another HTTP request meanwhile, {condition}, ms", pings, 1000))
    return rows


def _load(chrome: Chrome, url: str, shown: Callable[[], bool]) -> float:
    chrome.get("about:blank")
    began = time.perf_counter()
    chrome.get(url)
    _until(shown)
    return time.perf_counter() - began


def _update(chrome: Chrome, client: Any, step: int) -> float:
    began = time.perf_counter()
    client.log_metrics(step, {"reward": 1.0})
    _until(lambda: chrome.execute_script(_LAST_STEP) >= step)
    return time.perf_counter() - began


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("the page does not show it")
        time.sleep(0.01)


def _pings(address: str, seconds: float) -> list[float]:
    took, end = [], time.monotonic() + seconds
    with httpx.Client(timeout=60) as client:
        while time.monotonic() < end:
            began = time.perf_counter()
            client.get(f"{address}/nowhere")
            took.append(time.perf_counter() - began)
            time.sleep(0.02)
    return took


class _Viewers:
    """More browsers, as far as the server can tell: a page, and its socket kept open."""

    def __init__(self, address: str, key: str, paths: list[str], count: int) -> None:
        self._address, self._key = address, key
        self._paths = [paths[number % len(paths)] for number in range(count)]
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()
        opening = asyncio.run_coroutine_threadsafe(self._open(), self._loop)
        self._sockets = opening.result(timeout=120)

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(timeout=60)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    async def _open(self) -> list[Any]:
        sockets = []
        async with httpx.AsyncClient(cookies={"treadle_key": self._key}, timeout=60) as client:
            for path in self._paths:
                page = (await client.get(self._address + path)).text
                found = re.search(r"client_id': '([0-9a-f-]{36})'", page)
                assert found
                query = f"client_id={found[1]}&next_message_id=0&implicit_handshake=true"
                query += f"&document_id=d&tab_id={len(sockets)}"
                socket = socketio.AsyncClient()
                await socket.connect(
                    f"{self._address}/?{query}",
                    headers={"Cookie": f"treadle_key={self._key}"},
                    socketio_path="/_nicegui_ws/socket.io",
                    transports=["websocket"],
                )
                sockets.append(socket)
        return sockets

    async def _close(self) -> None:
        await asyncio.gather(*(socket.disconnect() for socket in self._sockets))


def _browser(folder: Path, cluster: Cluster, key: str) -> Chrome:
    options = ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in (*FLAGS, *QUIET, f"--user-data-dir={folder / 'chromium'}"):
        options.add_argument(flag)
    chrome = Chrome(options=options, service=Service(shutil.which("chromedriver")))
    chrome.get(f"http://{cluster.http_address}/login")
    chrome.add_cookie({"name": "treadle_key", "value": key, "path": "/"})
    return chrome


def _row(figure: str, seconds: list[float], scale: float) -> Row:
    ordered = sorted(seconds)
    worst = ordered[min(len(ordered) - 1, int(len(ordered) * 0.95))]
    return {"figure": figure, "value": f"{statistics.median(ordered) * scale:.0f} (p95 {worst * scale:.0f})"}
