"""What tests of recipes share: a tenant's client, the tiny base's tokenizer, an observer that remembers."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.support.cluster import Cluster
from treadle import ServiceClient
from treadle.recipes.reports import Observer, Report
from treadle.tokenizers import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
XML = ROOT / "client/treadle/data/sft_pip.jsonl"
"""Questions that are answered as <answer>...</answer>."""


class Remembering(Observer):
    """Keeps all that it hears; asks to stop after `stop_after` reports of steps."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.stop_after = stop_after
        self.run, self.done = "", 0
        self.plan: dict[str, Any] = {}
        self.notices: list[str] = []
        self.reports: list[Report] = []

    def started(self, run: str, plan: Mapping[str, Any], step: int) -> None:
        self.run, self.plan, self.done = run, dict(plan), step

    def notice(self, text: str) -> None:
        self.notices.append(text)

    def report(self, report: Report) -> None:
        self.reports.append(report)

    def should_stop(self) -> bool:
        return self.stop_after is not None and len(self.steps) >= self.stop_after

    @property
    def steps(self) -> list[dict[str, float]]:
        """The metrics of the reports about steps."""
        return [dict(report.metrics) for report in self.reports if report.num_tokens]

    def values(self, name: str) -> list[float]:
        """All values of one metric, in order."""
        return [report.metrics[name] for report in self.reports if name in report.metrics]

    def numbers(self) -> list[tuple[int, dict[str, float]]]:
        """Everything but times."""
        return [(report.step, dict(report.metrics)) for report in self.reports]


@pytest.fixture
def service(cluster: Cluster) -> Iterator[ServiceClient]:
    with ServiceClient(cluster.gateway_address, cluster.new_tenant()) as client:
        yield client


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return load_tokenizer(str(ROOT / "common/treadle_engine/data/pip"))
