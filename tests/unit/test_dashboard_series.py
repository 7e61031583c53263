"""Curves, charts and statuses of the dashboard: pure values."""

import math

import pytest

from treadle.v1 import admin_pb2, metrics_pb2, timeline_pb2, training_pb2
from treadle_gateway.http.dashboard import charts
from treadle_gateway.http.dashboard.charts import Window
from treadle_gateway.http.dashboard.reading import planned_steps, status_of
from treadle_gateway.http.dashboard.series import RunSeries, chart_of, charts_in_order, thinned


def point(step: int, source: int, seconds: float = 0.0, **values: float) -> metrics_pb2.MetricPoint:
    found = metrics_pb2.MetricPoint(
        step=step, source=source, values={k.replace("__", ":"): v for k, v in values.items()}
    )
    found.time.FromNanoseconds(round(seconds * 1e9))
    return found


def test_curves_are_merged_by_step_and_the_services_word_counts() -> None:
    series, service, user = RunSeries(), metrics_pb2.METRIC_SOURCE_SERVICE, metrics_pb2.METRIC_SOURCE_USER
    first = [
        point(2, service, 2.0, loss__sum=2.0, num_tokens__sum=100, grad_norm__mean=0.5),
        point(1, service, 1.0, loss__sum=3.0, num_tokens__sum=100),
        point(1, user, loss=9.0, reward=0.25, eval_loss=4.0),
    ]
    series.add(metrics_pb2.ListMetricsResponse(points=first, cursor=3))
    again = [point(2, service, 3.0, loss__sum=1.5, num_tokens__sum=100), point(2, user, reward=math.nan)]
    series.add(metrics_pb2.ListMetricsResponse(points=again, cursor=5))
    curves = series.curves()
    assert curves["loss"] == [(1, 3.0), (2, 1.5)]
    assert curves["reward"] == [(1, 0.25)]
    assert curves["eval_loss"] == [(1, 4.0)]
    assert curves["tokens/s"] == [(2, 50.0)]
    assert "grad norm" not in curves
    assert series.cursor == 5


def test_long_curves_are_thinned_to_their_ends() -> None:
    thin = thinned([(step, float(step)) for step in range(10_000)], 100)
    assert len(thin) == 100
    assert (thin[0], thin[-1]) == ((0, 0.0), (9999, 9999.0))
    assert thin == sorted(thin)


@pytest.mark.parametrize(
    ("name", "chart"),
    [
        ("loss", "loss"),
        ("eval_loss", "loss"),
        ("env/reward", "reward"),
        ("mean_reward", "reward"),
        ("kl", "KL"),
        ("kl_to_base", "KL"),
        ("buckle", "buckle"),
        ("accuracy", "accuracy"),
    ],
)
def test_curves_of_a_kind_share_a_chart(name: str, chart: str) -> None:
    assert chart_of(name) == chart


def test_the_usual_charts_come_first() -> None:
    assert charts_in_order(["zeal", "reward", "eval_loss", "accuracy"]) == ["loss", "reward", "accuracy", "zeal"]


def test_a_runs_status_follows_from_its_newest_step() -> None:
    run = training_pb2.Run(metadata={"plan": '{"steps": 10}'})
    run.created.FromSeconds(1000)
    assert (status_of(run, 1001.0, 10, is_finished=False), planned_steps(run)) == ("new", 10)
    run.latest.step = 4
    run.latest.time.FromSeconds(1010)
    assert status_of(run, 1020.0, 10, is_finished=False) == "running"
    assert status_of(run, 1100.0, 10, is_finished=False) == "interrupted"
    assert status_of(run, 1100.0, 0, is_finished=False) == "idle"
    assert status_of(run, 1020.0, 10, is_finished=True) == "finished"
    assert status_of(run, 1020.0, 4, is_finished=False) == "finished"
    run.state = training_pb2.RUN_STATE_DIVERGED
    assert status_of(run, 1020.0, 10, is_finished=True) == "diverged"
    for plan in ("nonsense", "[]", '{"steps": "many"}', ""):
        assert planned_steps(training_pb2.Run(metadata={"plan": plan})) == 0


def lane(*spans: tuple[float, float, dict[str, int]]) -> timeline_pb2.WorkerTimeline:
    found = timeline_pb2.WorkerTimeline(worker="trainer-0", kind=admin_pb2.WORKER_KIND_TRAINER)
    for started, took, shares in spans:
        span = found.spans.add(num_tokens=sum(shares.values()))
        span.started.FromNanoseconds(round(started * 1e9))
        span.took.FromNanoseconds(round(took * 1e9))
        for tenant, tokens in shares.items():
            span.shares.add(tenant=tenant, num_tokens=tokens)
    return found


def test_a_block_is_split_among_those_who_shared_it() -> None:
    worker = lane((10.0, 1.0, {"a": 30, "": 10}), (12.0, 0.5, {"a": 5}))
    colors = charts.tenant_colors([worker], "a", {})
    options = charts.timeline_chart([worker], Window(9.0, 13.0), colors)
    blocks = {series["name"]: [row[:5] for row in series["data"]] for series in options["series"]}
    assert blocks == {
        "a": [[0, 10_000.0, 11_000.0, 0.0, 0.75], [0, 12_000.0, 12_500.0, 0.0, 1.0]],
        "other": [[0, 10_000.0, 11_000.0, 0.75, 0.25]],
    }
    assert charts.busy_share(worker, Window(10.5, 13.0)) == pytest.approx(1.0 / 2.5)


def test_spans_closer_than_can_be_seen_are_drawn_as_one() -> None:
    worker = lane((1.0, 0.1, {"a": 5}), (1.11, 0.1, {"a": 7}), (1.3, 0.1, {"a": 1}), (1.4, 0.1, {"a": 1, "b": 1}))
    drawn = charts.coarse(worker, 0.02)
    assert [(round(span.took.ToNanoseconds() / 1e9, 3), span.num_tokens) for span in drawn.spans] == [
        (0.21, 12),
        (0.1, 1),
        (0.1, 2),
    ]
    assert len(worker.spans) == 4


def test_a_tenant_keeps_its_colour() -> None:
    known: dict[str, str] = {}
    first = charts.tenant_colors([lane((1, 1, {"b": 1, "": 1}))], "a", known)
    second = charts.tenant_colors([lane((1, 1, {"b": 1, "a": 1}))], "a", known)
    assert first["b"] == second["b"] != second["a"]
    assert "other" not in second
