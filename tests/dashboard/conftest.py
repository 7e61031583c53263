"""A headless browser, and requests with a key in their cookie."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from tests.support.cluster import Cluster

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--window-size=1360,1000",
)
PATIENCE_SECONDS = 100.0
_DATA_OF_CHART = """
const found = [...document.querySelectorAll('[data-chart]')].find((e) => e.dataset.chart === arguments[0]);
const chart = found && getElement(parseInt(found.id.slice(1))).chart;
return chart ? chart.getOption().series.map((series) => [series.name, series.data]) : null;
"""


class Browser:
    """Chromium, driven by what a person does; waits as long as a busy machine needs."""

    def __init__(self, chrome: Chrome, address: str) -> None:
        self.chrome, self.address = chrome, f"http://{address}"

    def open(self, path: str) -> None:
        self.chrome.get(self.address + path)

    def log_in(self, key: str) -> None:
        self.chrome.delete_all_cookies()
        self.open("/login")
        self.find("input[name=key]").send_keys(key)
        self.find("button[type=submit]").click()
        self.until(lambda: self.path == "/")

    @property
    def path(self) -> str:
        return str(self.chrome.current_url).removeprefix(self.address).partition("?")[0]

    @property
    def text(self) -> str:
        return self.find("main").text

    def find(self, selector: str, text: str = "") -> WebElement:
        """Returns the first visible element that matches and has a text, as soon as there is one."""

        def match() -> WebElement | None:
            found = self.chrome.find_elements(By.CSS_SELECTOR, selector)
            return next((one for one in found if text in (one.text or "") and one.is_enabled()), None)

        return self.until(match)

    def fill(self, setting: str, value: str) -> None:
        control = self.find(f"input[data-setting={setting}]")
        control.send_keys(Keys.CONTROL, "a")
        control.send_keys(Keys.BACKSPACE, value)

    def curves(self, chart: str) -> dict[str, list[list[float]]]:
        """Returns what a chart shows now, by the names of its legend; empty while there is none."""
        found: list[tuple[str, list[list[float]]]] | None = self.chrome.execute_script(_DATA_OF_CHART, chart)
        return dict(found or [])

    def until(self, condition: Callable[[], Any]) -> Any:
        """Waits for something to be true, and returns it."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                if value := condition():
                    return value
            except StaleElementReferenceException:
                pass
            assert time.monotonic() < deadline, f"in vain at {self.chrome.current_url}:\n{self.text[:2000]}"
            time.sleep(0.1)

    def complaints(self) -> list[str]:
        """Returns what pages have logged as errors since the last call."""
        return [entry["message"] for entry in self.chrome.get_log("browser") if entry["level"] == "SEVERE"]


@pytest.fixture(scope="session")
def chrome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    """One browser for all tests; each begins without cookies."""
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.fail("these tests need Debian's packages chromium and chromium-driver")
    options = ChromeOptions()
    options.binary_location = binary
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = Chrome(options=options, service=Service(driver))
    browser.set_page_load_timeout(PATIENCE_SECONDS)
    browser.set_script_timeout(PATIENCE_SECONDS)
    try:
        yield browser
    finally:
        browser.quit()


@pytest.fixture
def browser(chrome: Chrome, cluster: Cluster) -> Iterator[Browser]:
    opened = Browser(chrome, cluster.http_address)
    opened.complaints()
    yield opened
    chrome.get("about:blank")


def fetch(cluster: Cluster, path: str, key: str = "") -> httpx.Response:
    """Returns the answer to a GET with a key in the cookie, redirects not followed."""
    cookies = {"treadle_key": key} if key else {}
    return httpx.get(f"http://{cluster.http_address}{path}", cookies=cookies, timeout=60)


def write_rows(path: Path, count: int = 48) -> Path:
    """Writes prompt/response rows that the tiny base learns within some steps."""
    rows = [{"prompt": f"say {n % 6}", "response": f"number {n % 6}!"} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
