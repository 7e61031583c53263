"""Metrics of runs as curves: merged by step, with the rates that follow from them, few enough points to draw.

Pure: knows neither calls nor charts.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from treadle.v1 import metrics_pb2

MAX_POINTS: Final = 600
Curve = list[tuple[int, float]]
"""Steps and values, in order of step."""

# How the service calls them, and as what they are shown.
_SERVICE_NAMES: Final = {
    "loss:sum": "loss",
    "grad_norm:mean": "grad norm",
    "learning_rate:mean": "learning rate",
}
# What an owner logs under a name of these is the same as what the service recorded.
_SAME: Final = {"loss": "loss", "train_loss": "loss", "grad_norm": "grad norm", "learning_rate": "learning rate"}
TOKENS_PER_SECOND: Final = "tokens/s"
_RATE_STEPS: Final = 8


class RunSeries:
    """The points of one run; grows by what changed."""

    def __init__(self) -> None:
        self.cursor = 0
        self._service: dict[int, metrics_pb2.MetricPoint] = {}
        self._user: dict[int, metrics_pb2.MetricPoint] = {}

    def add(self, page: metrics_pb2.ListMetricsResponse) -> None:
        """Takes points in; a later one of the same step and source replaces the one before."""
        for point in page.points:
            of_source = self._user if point.source == metrics_pb2.METRIC_SOURCE_USER else self._service
            of_source[point.step] = point
        self.cursor = page.cursor

    def curves(self) -> dict[str, Curve]:
        """Returns all curves by the names that people read."""
        recorded: dict[str, Curve] = {}
        for step in sorted(self._service):
            for name, value in self._service[step].values.items():
                if name in _SERVICE_NAMES:
                    recorded.setdefault(_SERVICE_NAMES[name], []).append((step, value))
        if rates := self._rates():
            recorded[TOKENS_PER_SECOND] = rates
        logged: dict[str, Curve] = {}
        for step in sorted(self._user):
            for name, value in self._user[step].values.items():
                logged.setdefault(_SAME.get(name, name), []).append((step, value))
        # Where both say the same, the service's word counts.
        return {name: thinned(curve) for name, curve in (logged | recorded).items()}

    def _rates(self) -> Curve:
        """Returns tokens per second of wall time, over the last steps of each; pauses of the owner count."""
        rates: Curve = []
        points = [self._service[step] for step in sorted(self._service)]
        for place in range(1, len(points)):
            first, last = points[max(0, place - _RATE_STEPS)], points[place]
            seconds = (last.time.ToNanoseconds() - first.time.ToNanoseconds()) / 1e9
            tokens = sum(p.values["num_tokens:sum"] for p in points[max(0, place - _RATE_STEPS) + 1 : place + 1])
            if seconds > 0 and tokens:
                rates.append((last.step, tokens / seconds))
        return rates


def thinned(curve: Sequence[tuple[int, float]], limit: int = MAX_POINTS) -> Curve:
    """Returns at most `limit` points, evenly chosen, the last among them; values that are not finite are left out."""
    finite = [(step, value) for step, value in curve if math.isfinite(value)]
    if len(finite) <= limit:
        return finite
    stride = (len(finite) - 1) / (limit - 1)
    return [finite[round(place * stride)] for place in range(limit)]


def chart_of(name: str) -> str:
    """Returns the chart that a curve belongs to: losses share one, so do rewards and divergences."""
    lower = name.lower()
    for word, chart in (("loss", "loss"), ("reward", "reward"), ("kl", "KL")):
        if word in lower.replace("/", "_").split("_") or lower.endswith(word):
            return chart
    return name


def charts_in_order(names: Iterable[str]) -> list[str]:
    """Returns the charts of some curves, the usual ones first."""
    charts = {chart_of(name): None for name in names}
    usual = ("loss", "reward", "KL", "grad norm", "learning rate", TOKENS_PER_SECOND)
    return [*(name for name in usual if name in charts), *sorted(name for name in charts if name not in usual)]


def summary(values: Mapping[str, float]) -> dict[str, float]:
    """Returns what a list shows of a run's newest step."""
    return {shown: values[name] for name, shown in _SERVICE_NAMES.items() if name in values}
