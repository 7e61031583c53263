"""What Prometheus may know of a service: calls, readiness, and what a role adds as collectors of its own.

Numbers that a service keeps anyway are read when they are scraped (`Reading`); only what has no other place is counted
as it happens. Labels are method names, kinds, bases and reasons: never tenants, runs or adapters, whose number has no
bound. Nothing is served unless `metrics_listen` is set. Knows nothing of what the numbers mean.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Final, Literal

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from prometheus_client import Metric

SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
"""Buckets of all durations, from a commit to a long pass."""
COUNTS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Buckets of all small numbers of things that share something."""

_CALLS = Histogram(
    "treadle_rpc_duration_seconds",
    "Calls from their arrival to their end, streams included",
    ["method", "code"],
    buckets=SECONDS,
)
_REFUSALS = Counter("treadle_rpc_errors_total", "Calls that ended with an error, by its reason", ["method", "reason"])
_RUNNING = Gauge("treadle_rpc_in_flight", "Calls that are being answered", ["method"])
QUOTA_REFUSALS = Counter("treadle_quota_refusals_total", "Work refused for a tenant's quota", ["kind"])

Labels = Mapping[str, str]
Values = float | Iterable[tuple[Labels, float]]


class CallOutcome:
    """How a call ends, as far as it is known."""

    def __init__(self) -> None:
        self.code = "OK"
        self.reason = ""

    def failed(self, code: str, reason: str = "") -> None:
        """Notes a status other than OK."""
        self.code, self.reason = code, reason or code


@contextmanager
def observing_call(method: str) -> Iterator[CallOutcome]:
    """Counts a call of a method that exists, and how it ends."""
    name = method.rpartition(".")[2]
    outcome, began = CallOutcome(), time.monotonic()
    running = _RUNNING.labels(name)
    running.inc()
    try:
        yield outcome
    finally:
        running.dec()
        _CALLS.labels(name, outcome.code).observe(time.monotonic() - began)
        if outcome.reason:
            _REFUSALS.labels(name, outcome.reason).inc()


@dataclass(frozen=True, slots=True)
class Reading:
    """A number that is read when it is scraped: one, or one per set of labels."""

    name: str
    help: str
    read: Callable[[], Values]
    kind: Literal["gauge", "counter"] = "gauge"
    labels: tuple[str, ...] = ()

    def family(self) -> Metric:
        """Returns the metric as it stands."""
        make = GaugeMetricFamily if self.kind == "gauge" else CounterMetricFamily
        family = make(self.name, self.help, labels=self.labels)
        values = self.read()
        for labels, value in [({}, values)] if isinstance(values, (int, float)) else values:
            family.add_metric([labels[label] for label in self.labels], value)
        return family


class Readings(Collector):
    """Readings that are taken together; the scraping thread calls, so `read` must only look."""

    def __init__(self, *readings: Reading) -> None:
        self._readings = readings

    def collect(self) -> Iterator[Metric]:
        """Yields each metric as it stands."""
        for reading in self._readings:
            yield reading.family()


class _Process(Collector):
    """What this process counts as it happens, whichever of its services did it."""

    def collect(self) -> Iterable[Metric]:
        """Yields all metrics of the process."""
        return REGISTRY.collect()


class ServiceMetrics:
    """The metrics of one service; those of several in one process are kept apart."""

    def __init__(self) -> None:
        # Without descriptions nothing is collected at registration, when half of the service is not there yet.
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(_Process())

    def add(self, *readings: Reading) -> None:
        """Has readings taken at every scrape from now on."""
        self.registry.register(Readings(*readings))

    def add_build(self, role: str) -> None:
        """Says what runs here."""
        labels = {"role": role, "version": version(), "python": platform.python_version()}
        self.add(
            Reading(
                "treadle_build_info", "What runs here", lambda: [(labels, 1.0)], labels=("role", "version", "python")
            )
        )

    @contextmanager
    def served(self, listen: str) -> Iterator[int]:
        """Serves the metrics over HTTP at host:port and gives the port; does nothing for an empty address.

        Raises SystemExit when the address is taken.
        """
        if not listen:
            yield 0
            return
        host, _, port = listen.rpartition(":")
        try:
            server, thread = start_http_server(int(port), host.strip("[]"), self.registry)
        except (OSError, ValueError) as error:
            raise SystemExit(f"metrics cannot be served at {listen}: {error}") from error
        try:
            yield server.server_port
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


def version() -> str:
    """Returns the release that is installed."""
    return metadata.version("treadle")
