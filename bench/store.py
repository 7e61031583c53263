"""What durability costs: commits per second and their latency, with SQLite and with PostgreSQL, alone and in company.

A writer is a run whose operations are appended and committed one after the other through the store's gRPC interface,
as a trainer does it; many writers at once share commits. Every acknowledged write was synced to the disk. Beside it
stands what the disk itself takes for a write and an fsync. PostgreSQL is a server that the benchmark starts.

What durability adds to an operation is measured in a whole deployment: the append runs beside the computation, so a
result waits for it only where it was there first.
"""

import argparse
import asyncio
import os
import signal
import tempfile
import threading
import time
import urllib.request
from contextlib import closing
from pathlib import Path
from statistics import median

import numpy as np
import psutil
from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr
from sqlalchemy import Connection, Engine, event

from tests.store.conftest import TOKEN, Caller, serve
from tests.store.process import StoreProcess
from tests.store.test_maintenance import result
from tests.support.cluster import Cluster, free_port
from tests.support.postgres import PostgresServer
from treadle import AdamParams, Datum, ModelInput, ServiceClient
from treadle.internal.v1 import journal_pb2
from treadle.v1 import training_pb2
from treadle_service.channels import open_channel
from treadle_store.clock import system_clock
from treadle_store.settings import StoreSettings

Row = dict[str, str]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's options."""
    parser.add_argument("--seconds", type=float, default=2.0, help="length of each measurement")
    parser.add_argument("--rounds", type=int, default=3, help="rounds; the databases alternate")
    parser.add_argument("--writers", nargs="+", type=int, default=[1, 8, 64], help="runs that write at once")
    parser.add_argument("--steps", type=int, default=100, help="training steps whose added latency is measured")
    parser.add_argument("--payload", type=int, default=8192, help="bytes of an operation: 1,000 tokens")


def run(options: argparse.Namespace) -> list[Row]:
    """Measures both databases and returns the rows."""
    server = PostgresServer()
    try:
        server.create()
        return asyncio.run(_measure_all(options, server))
    finally:
        server.close()


async def _measure_all(options: argparse.Namespace, server: PostgresServer) -> list[Row]:
    rows = [{"figure": "one write and fsync of 4 KiB by itself", "value": _percentiles(_sync_times())}]
    with tempfile.TemporaryDirectory() as folder:
        urls = {"SQLite": f"sqlite:///{folder}/store.db", "PostgreSQL": server.new_database()}
        for writers in options.writers:
            found: dict[str, list[_Sample]] = {name: [] for name in urls}
            for round_ in range(options.rounds):
                for name, url in urls.items():
                    place = Path(folder) / f"{name}-{writers}-{round_}"
                    found[name].append(await _measure(url, place, writers, options))
            rows += [row for name, samples in found.items() for row in _rows(name, writers, samples)]
        for name in urls:
            # The others have rows already, and a deployment of its own comes first to an empty one.
            url = f"sqlite:///{folder}/own.db" if name == "SQLite" else server.new_database()
            rows += await asyncio.to_thread(_added, name, url, Path(folder) / f"{name}-added", options.steps)
    return rows


def _added(name: str, url: str, folder: Path, steps: int) -> list[Row]:
    """Trains in a whole deployment, synchronously and with steps queued ahead, and asks the trainer what waited."""
    metrics = f"127.0.0.1:{free_port()}"
    settings = {"TREADLE_STORE_DATABASE_URL": url, "TREADLE_TRAINER_METRICS_LISTEN": metrics}
    rows: list[Row] = []
    with closing(Cluster(folder, settings=settings)) as cluster:
        cluster.start()
        for ahead in (0, 4):
            with ServiceClient(cluster.gateway_address, cluster.new_tenant()) as service:
                _train(service, 3, ahead)
                before = _scrape(metrics)
                _train(service, steps, ahead)
                added, whole = (after - then for after, then in zip(_scrape(metrics), before, strict=True))
            value = f"{1e3 * added / (2 * steps):.2f} ms of {1e3 * whole / (2 * steps):.1f} ms"
            how = f"{ahead} steps ahead" if ahead else "one step at a time"
            rows.append({"figure": f"{name}: added to an operation by durability, mean, {how}", "value": value})
    return rows


def _train(service: ServiceClient, steps: int, ahead: int) -> None:
    client = service.create_lora_training_client("treadle/pip", rank=16)
    tokens = np.arange(1, 257) % 1000
    datum = Datum(ModelInput.from_ints(tokens[:-1]), {"target_tokens": tokens[1:], "weights": np.ones(255)})
    waiting = []
    for _ in range(steps):
        client.forward_backward([datum] * 4, "cross_entropy")
        waiting.append(client.optim_step(AdamParams(learning_rate=1e-4)))
        if len(waiting) > ahead:
            waiting.pop(0).result(120)
    for handle in waiting:
        handle.result(120)


def _scrape(address: str) -> tuple[float, float]:
    """Returns the seconds that results were withheld, and those from acceptance to result, since the start."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    sums: dict[str, float] = {}
    for sample in (sample for family in families for sample in family.samples):
        sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
    withheld = sums["treadle_trainer_withheld_seconds_sum"]
    return withheld, withheld + sums["treadle_trainer_operation_seconds_sum"]


class _Sample:
    """One measurement."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.wall = self.client_cpu = self.store_cpu = self.group = 0.0


async def _measure(url: str, folder: Path, writers: int, options: argparse.Namespace) -> _Sample:
    """Drives a store process, then for a shorter time one in this process, where commits can be counted."""
    sample = _Sample()
    folder.mkdir()
    process = StoreProcess(folder, {"TREADLE_STORE_DATABASE_URL": url, "TREADLE_STORE_LOG_LEVEL": "error"})
    process.start()
    async with open_channel(await process.address()) as channel:
        assert process.process is not None
        store = psutil.Process(process.process.pid)
        begin, before = time.process_time(), sum(store.cpu_times()[:2])
        sample.wall = await _drive(Caller(channel), writers, options.seconds, options.payload, sample.seconds)
        sample.client_cpu, sample.store_cpu = time.process_time() - begin, sum(store.cpu_times()[:2]) - before
    await asyncio.to_thread(process.end, signal.SIGTERM)
    settings = StoreSettings(
        listen="127.0.0.1:0", data_dir=folder, database_url=url, internal_token=SecretStr(TOKEN), log_level="error"
    )
    num_commits = 0

    def count(_: Connection) -> None:
        nonlocal num_commits
        num_commits += threading.current_thread().name == "store-writer"

    event.listen(Engine, "commit", count)
    async with serve(settings, system_clock) as caller:
        seconds: list[float] = []
        await _drive(caller, writers, options.seconds / 2, options.payload, seconds)
    event.remove(Engine, "commit", count)
    sample.group = len(seconds) / max(1, num_commits - 2 * writers)
    return sample


async def _drive(caller: Caller, writers: int, length: float, payload: int, seconds: list[float]) -> float:
    """Writes to as many new runs at once for `length` seconds; returns the time that it took."""
    runs = [await caller.new_run("acme") for _ in range(writers)]
    epochs = [await caller.claim(name) for name in runs]
    begin = time.perf_counter()
    writing = [
        _write(caller, name, epoch, begin + length, bytes(payload), seconds)
        for name, epoch in zip(runs, epochs, strict=True)
    ]
    await asyncio.gather(*writing)
    return time.perf_counter() - begin


async def _write(caller: Caller, run: str, epoch: int, end: float, payload: bytes, seconds: list[float]) -> None:
    seq = 0
    while time.perf_counter() < end:
        seq += 1
        message = training_pb2.Operation(seq=seq).SerializeToString() + payload
        append = journal_pb2.JournalAppend(seq=seq, digest=seq, payload=message)
        entry = journal_pb2.JournalEntry(run=run, epoch=epoch, appends=[append], commits=[result(seq)])
        begin = time.perf_counter()
        assert await caller.write(entry) == [""]
        seconds.append(time.perf_counter() - begin)


def _sync_times() -> list[float]:
    with tempfile.TemporaryFile() as file:
        times = []
        for _ in range(100):
            begin = time.perf_counter()
            os.write(file.fileno(), bytes(4096))
            os.fdatasync(file.fileno())
            times.append(time.perf_counter() - begin)
    return times


def _rows(name: str, writers: int, samples: list[_Sample]) -> list[Row]:
    where = f"{name}, {writers} writer{'s' * (writers > 1)}"
    rate = median(len(sample.seconds) / sample.wall for sample in samples)
    group = median(sample.group for sample in samples)
    store_cpu = median(sample.store_cpu / len(sample.seconds) for sample in samples)
    client_cpu = median(sample.client_cpu / len(sample.seconds) for sample in samples)
    every = [seconds for sample in samples for seconds in sample.seconds]
    return [
        {"figure": f"{where}: append and commit, acknowledged", "value": _percentiles(every)},
        {
            "figure": f"{where}: operations",
            "value": f"{rate:.0f}/s, {group:.1f} per commit; CPU each: store {1e3 * store_cpu:.2f} ms, "
            f"client {1e3 * client_cpu:.2f} ms",
        },
    ]


def _percentiles(seconds: list[float]) -> str:
    ordered = sorted(seconds)
    return f"p50 {1e3 * ordered[len(ordered) // 2]:.1f} ms, p99 {1e3 * ordered[int(len(ordered) * 0.99)]:.1f} ms"
