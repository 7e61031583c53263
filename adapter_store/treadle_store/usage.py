"""What tenants have used: sums per tenant, run and day, and who has reported them.

Training is recorded with the result of an operation, in the same transaction, so once whatever is repeated. Sampling
is reported by samplers; a repeated report is known by its number. Bodies for Database.read and Database.write.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from sqlalchemy import ColumnElement, Connection, Row, and_, delete, func, select

from treadle.errors import make_error
from treadle.internal.v1 import usage_pb2
from treadle.names import RunName, check_tenant, parse_run
from treadle.v1 import admin_pb2
from treadle_store import quotas
from treadle_store.clock import to_duration
from treadle_store.pages import PageRequest, decode_token, encode_token
from treadle_store.tables import usage, usage_reporters
from treadle_store.upsert import insert_or_update

DAY_US: Final = 86_400_000_000
# Longer than any sampler tries to repeat a report.
_REPORTER_US: Final = DAY_US
_SUMS: Final = ("num_operations", "training_tokens", "prompt_tokens", "sampled_tokens", "device_us")

# Columns come and go with the query; SQLAlchemy types a row by its tuple, which would say less than the names do.
SumRow = Row[*tuple[object, ...]]


@dataclass(frozen=True, slots=True)
class Span:
    """Days from `first` to `last`, both included, counted since 1970."""

    first: int
    last: int


@dataclass(frozen=True, slots=True)
class TrainingUse:
    """What operations of a run used."""

    name: RunName
    num_operations: int
    num_tokens: int
    device_us: int
    now_us: int


def record_training(connection: Connection, uses: Sequence[TrainingUse], now_us: int) -> dict[str, usage_pb2.Budget]:
    """Adds what operations used and charges their tenants; returns the budgets of those tenants that have a quota."""
    rows = [
        {
            "tenant": use.name.tenant,
            "run": use.name.run,
            "day": use.now_us // DAY_US,
            "num_operations": use.num_operations,
            "training_tokens": use.num_tokens,
            "prompt_tokens": 0,
            "sampled_tokens": 0,
            "device_us": use.device_us,
        }
        for use in uses
    ]
    insert_or_update(connection, usage, rows, add=_SUMS)
    tokens: Counter[str] = Counter()
    for use in uses:
        tokens[use.name.tenant] += use.num_tokens
    return quotas.charge(connection, "training", tokens, now_us)


def record_report(connection: Connection, report: usage_pb2.ReportUsageRequest, now_us: int) -> list[usage_pb2.Budget]:
    """Adds what a sampler reports, unless it has reported it before; returns the tenants' budgets."""
    if not 1 <= len(report.reporter) <= 128:
        raise make_error("BAD_NAME", "a report must name its reporter")
    here = usage_reporters.c.reporter == report.reporter
    last = connection.execute(select(usage_reporters.c.seq).where(here).with_for_update()).scalar_one_or_none() or 0
    tenants = sorted({check_tenant(use.tenant) for use in report.uses})
    if report.seq <= last:
        return quotas.budgets_of(connection, tenants, now_us)
    if report.seq != last + 1:
        raise make_error("SEQ_GAP", f"{report.reporter} has reported {last}, so {report.seq} is not its next report")
    connection.execute(delete(usage_reporters).where(usage_reporters.c.reported_us < now_us - _REPORTER_US))
    reported = {"reporter": report.reporter, "seq": report.seq, "reported_us": now_us}
    insert_or_update(connection, usage_reporters, [reported], replace=("seq", "reported_us"))
    insert_or_update(connection, usage, [_to_row(use, now_us) for use in report.uses], add=_SUMS)
    tokens: Counter[str] = Counter()
    for use in report.uses:
        tokens[use.tenant] += use.prompt_tokens + use.sampled_tokens
    quotas.charge(connection, "sampling", tokens, now_us)
    return quotas.budgets_of(connection, tenants, now_us)


def read_usage(
    connection: Connection, tenant: str, span: Span, page: PageRequest, now_us: int
) -> admin_pb2.GetUsageResponse:
    """Returns what a tenant has used in a span, in total and a page of its runs. Raises BAD_PAGE_TOKEN."""
    mine = and_(usage.c.tenant == tenant, usage.c.day >= span.first, usage.c.day <= span.last)
    by_run = select(usage.c.run, *_sums()).where(mine).group_by(usage.c.run)
    if page.token:
        _, (after,) = decode_token(page.token, 1)
        by_run = by_run.where(usage.c.run > after)
    rows = connection.execute(by_run.order_by(usage.c.run).limit(page.limit + 1)).all()
    shown = rows[: page.limit]
    total = connection.execute(select(*_sums()).where(mine)).one()
    return admin_pb2.GetUsageResponse(
        tenant=tenant,
        total=_to_usage(total),
        runs=[
            admin_pb2.RunUsage(run=str(RunName(tenant, row.run)) if row.run else "", usage=_to_usage(row))
            for row in shown
        ],
        next_page_token=encode_token(0, [shown[-1].run]) if len(rows) > page.limit else "",
        stored_bytes=quotas.stored_bytes(connection, tenant),
        num_runs=quotas.count_runs(connection, tenant),
        num_active_runs=quotas.count_active_runs(connection, tenant, now_us),
    )


def _sums() -> list[ColumnElement[int]]:
    return [func.coalesce(func.sum(usage.c[name]), 0).label(name) for name in _SUMS]


def _to_row(use: usage_pb2.SamplingUse, now_us: int) -> dict[str, object]:
    run = parse_run(use.run) if use.run else None
    if run is not None and run.tenant != use.tenant:
        raise make_error("BAD_NAME", f"{run} is not a run of {use.tenant!r}")
    return {
        "tenant": use.tenant,
        "run": run.run if run is not None else "",
        "day": now_us // DAY_US,
        "num_operations": use.num_requests,
        "training_tokens": 0,
        "prompt_tokens": use.prompt_tokens,
        "sampled_tokens": use.sampled_tokens,
        "device_us": use.device_us,
    }


def _to_usage(row: SumRow) -> admin_pb2.Usage:
    # PostgreSQL sums into decimals.
    return admin_pb2.Usage(
        num_operations=int(row.num_operations),
        training_tokens=int(row.training_tokens),
        prompt_tokens=int(row.prompt_tokens),
        sampled_tokens=int(row.sampled_tokens),
        device_time=to_duration(int(row.device_us)),
    )
