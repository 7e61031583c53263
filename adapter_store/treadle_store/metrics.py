"""Metrics of runs: one point per optimizer step, written with its result, and what owners log beside it.

A series is thinned by rule, so that it stays small however long a run trains: the newest WINDOW points are all there,
behind them every second one, behind twice as many every fourth, and so on. Bodies for Database.read and
Database.write.
"""

from collections.abc import Mapping, Sequence
from typing import Final, cast

from sqlalchemy import ColumnElement, Connection, Table, and_, delete, or_, select, update

from treadle.errors import make_error
from treadle.internal.v1 import journal_pb2
from treadle.names import RunName
from treadle.v1 import metrics_pb2
from treadle_store.catalog import RunRow, fetch_run, lock_run
from treadle_store.clock import to_timestamp
from treadle_store.tables import metrics, runs, sample_sets
from treadle_store.upsert import insert_or_update

WINDOW: Final = 1024
SAMPLE_WINDOW: Final = 32
MAX_PAGE: Final = 1000
# Sets are long: so many of the longest stay below a message's limit.
MAX_SAMPLE_PAGE: Final = 32
MAX_STEPS: Final = 256
MAX_STEP: Final = 2**53
MAX_NAMES: Final = 32
MAX_NAME_CHARS: Final = 64
MAX_SAMPLES: Final = 8
MAX_SAMPLE_BYTES: Final = 8 * 1024
_THIN_EVERY: Final = 64
_SERVICE: Final = metrics_pb2.METRIC_SOURCE_SERVICE
_USER: Final = metrics_pb2.METRIC_SOURCE_USER
_CHANGED: Final = ("cursor", "point")

Columns = dict[str, int]
Values = dict[str, object]


def plan_steps(
    name: RunName, row: RunRow, commits: Sequence[journal_pb2.JournalCommit], now_us: int
) -> tuple[list[Values], Columns]:
    """Returns the points of optimizer steps, and the columns of the run's row as they are with them.

    The caller holds the run's row, and writes each commit once.
    """
    steps = [commit.metrics for commit in commits if commit.HasField("metrics")]
    cursor, ordinal = row.metric_cursor, row.num_recorded
    points = [
        _row(name, _SERVICE, ordinal + place, cursor + place, step.step, step.values, now_us)
        for place, step in enumerate(steps, 1)
    ]
    moved = {
        "metric_cursor": cursor + len(steps),
        "num_recorded": ordinal + len(steps),
        "last_step": steps[-1].step if steps else row.last_step,
    }
    return points, moved


def record_steps(connection: Connection, points: Mapping[RunName, Sequence[Values]]) -> None:
    """Keeps the planned points of runs."""
    insert_or_update(connection, metrics, [point for added in points.values() for point in added], replace=_CHANGED)
    for name, added in points.items():
        newest = cast(int, added[-1]["ordinal"])
        _thin(connection, metrics, name, newest - len(added), newest, WINDOW, source=_SERVICE)


def log_steps(connection: Connection, name: RunName, steps: Sequence[metrics_pb2.LoggedStep], now_us: int) -> None:
    """Adds what an owner logs to the points of its steps. Raises BAD_VALUE or RUN_NOT_FOUND."""
    for step in steps:
        _check(step)
    if len(steps) > MAX_STEPS:
        raise make_error("BAD_VALUE", f"{len(steps)} steps are logged at once, at most {MAX_STEPS} may be")
    row = lock_run(connection, name)
    cursor, num_logged, num_sampled = row.metric_cursor, row.num_logged, row.num_sampled
    with_values = [step for step in steps if step.values]
    known = _known_points(connection, name, {step.step for step in with_values})
    points: dict[int, dict[str, object]] = {}
    for step in with_values:
        values = known.setdefault(step.step, {})
        num_logged += not values
        values.update(step.values)
        if len(values) > MAX_NAMES:
            raise make_error("BAD_VALUE", f"step {step.step} has {len(values)} names, at most {MAX_NAMES} are kept")
        cursor += 1
        row_of_step = _row(name, _USER, num_logged, cursor, step.step, values, now_us)
        if step.step in points:
            row_of_step["ordinal"] = points[step.step]["ordinal"]
        points[step.step] = row_of_step
    insert_or_update(connection, metrics, list(points.values()), replace=_CHANGED)
    for step in steps:
        if step.samples:
            cursor, num_sampled = cursor + 1, num_sampled + 1
            _put_samples(connection, name, step, num_sampled, cursor, now_us)
    moved = {"metric_cursor": cursor, "num_logged": num_logged, "num_sampled": num_sampled}
    connection.execute(update(runs).where(runs.c.tenant == name.tenant, runs.c.run == name.run).values(**moved))
    _thin(connection, metrics, name, row.num_logged, num_logged, WINDOW, source=_USER)
    _thin(connection, sample_sets, name, row.num_sampled, num_sampled, SAMPLE_WINDOW)


def list_metrics(
    connection: Connection, name: RunName, request: metrics_pb2.ListMetricsRequest
) -> metrics_pb2.ListMetricsResponse:
    """Returns the points that changed behind a cursor. Raises RUN_NOT_FOUND."""
    fetch_run(connection, name)
    limit = min(request.page_size or MAX_PAGE, MAX_PAGE)
    query = (
        select(metrics.c.cursor, metrics.c.point)
        .where(_of_run(metrics, name), metrics.c.cursor > _clamp(request.after_cursor))
        .where(metrics.c.step >= _clamp(request.from_step))
        .order_by(metrics.c.cursor)
        .limit(limit + 1)
    )
    rows = connection.execute(query).all()
    shown = rows[:limit]
    return metrics_pb2.ListMetricsResponse(
        points=[metrics_pb2.MetricPoint.FromString(row.point) for row in shown],
        cursor=shown[-1].cursor if shown else request.after_cursor,
        more=len(rows) > limit,
    )


def list_samples(
    connection: Connection, name: RunName, request: metrics_pb2.ListSamplesRequest
) -> metrics_pb2.ListSamplesResponse:
    """Returns the texts that changed behind a cursor. Raises RUN_NOT_FOUND."""
    fetch_run(connection, name)
    limit = min(request.page_size or MAX_SAMPLE_PAGE, MAX_SAMPLE_PAGE)
    query = (
        select(sample_sets.c.cursor, sample_sets.c.samples)
        .where(_of_run(sample_sets, name), sample_sets.c.cursor > _clamp(request.after_cursor))
        .order_by(sample_sets.c.cursor)
        .limit(limit + 1)
    )
    rows = connection.execute(query).all()
    shown = rows[:limit]
    return metrics_pb2.ListSamplesResponse(
        sets=[metrics_pb2.SampleSet.FromString(row.samples) for row in shown],
        cursor=shown[-1].cursor if shown else request.after_cursor,
        more=len(rows) > limit,
    )


def _row(
    name: RunName,
    source: metrics_pb2.MetricSource,
    ordinal: int,
    cursor: int,
    step: int,
    values: Mapping[str, float],
    now_us: int,
) -> dict[str, object]:
    point = metrics_pb2.MetricPoint(step=step, time=to_timestamp(now_us), source=source, values=values)
    return {
        "tenant": name.tenant,
        "run": name.run,
        "source": source,
        "step": step,
        "ordinal": ordinal,
        "cursor": cursor,
        "point": point.SerializeToString(),
    }


def _known_points(connection: Connection, name: RunName, steps: set[int]) -> dict[int, dict[str, float]]:
    if not steps:
        return {}
    query = select(metrics.c.step, metrics.c.point).where(
        _of_run(metrics, name), metrics.c.source == _USER, metrics.c.step.in_(steps)
    )
    return {row.step: dict(metrics_pb2.MetricPoint.FromString(row.point).values) for row in connection.execute(query)}


def _put_samples(
    connection: Connection, name: RunName, step: metrics_pb2.LoggedStep, ordinal: int, cursor: int, now_us: int
) -> None:
    kept = metrics_pb2.SampleSet(step=step.step, time=to_timestamp(now_us), samples=step.samples)
    row = {
        "tenant": name.tenant,
        "run": name.run,
        "step": step.step,
        "ordinal": ordinal,
        "cursor": cursor,
        "samples": kept.SerializeToString(),
    }
    insert_or_update(connection, sample_sets, [row], replace=("cursor", "samples"))


def _thin(
    connection: Connection, table: Table, name: RunName, before: int, newest: int, window: int, source: int = 0
) -> None:
    """Drops points by their ordinals, every now and then: behind a window every second one, and so on."""
    if newest <= window or before // _THIN_EVERY == newest // _THIN_EVERY:
        return
    rules, age, stride = [], window, 2
    while age < newest:
        rules.append(and_(table.c.ordinal <= newest - age, table.c.ordinal % stride != 0))
        age, stride = age * 2, stride * 2
    of_series = (table.c.source == source,) if source else ()
    connection.execute(delete(table).where(_of_run(table, name), *of_series, or_(*rules)))


def _of_run(table: Table, name: RunName) -> ColumnElement[bool]:
    return and_(table.c.tenant == name.tenant, table.c.run == name.run)


def _clamp(number: int) -> int:
    return min(number, 2**63 - 1)


def _check(step: metrics_pb2.LoggedStep) -> None:
    if step.step > MAX_STEP:
        raise make_error("BAD_VALUE", f"step {step.step} is out of range; use at most 2^53")
    if len(step.values) > MAX_NAMES:
        raise make_error("BAD_VALUE", f"step {step.step} has {len(step.values)} names, at most {MAX_NAMES} are kept")
    for metric in step.values:
        if not 1 <= len(metric) <= MAX_NAME_CHARS or not metric.isprintable():
            raise make_error(
                "BAD_VALUE", f"{metric[:MAX_NAME_CHARS]!r} is no name: use 1 to {MAX_NAME_CHARS} printable characters"
            )
    if len(step.samples) > MAX_SAMPLES:
        raise make_error("BAD_VALUE", f"step {step.step} has {len(step.samples)} texts, at most {MAX_SAMPLES} are kept")
    for sample in step.samples:
        if sample.ByteSize() > MAX_SAMPLE_BYTES:
            raise make_error(
                "BAD_VALUE", f"a text of step {step.step} has {sample.ByteSize()} bytes, at most {MAX_SAMPLE_BYTES}"
            )
