"""What a tenant may use: limits, and two token buckets of one number each.

A bucket is the time at which all that was used is paid for at the tenant's rate (the generic cell rate algorithm).
Time before now is credit, at most one minute of it; time after now is debt. The row is the only truth: workers keep
copies, gateways nothing, so that any number of each can serve a tenant. Bodies for Database.read and Database.write.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

from sqlalchemy import ColumnElement, Connection, Row, and_, bindparam, exists, func, select, update

from treadle.errors import make_error
from treadle.internal.v1 import usage_pb2
from treadle.names import RunName
from treadle.v1 import admin_pb2
from treadle_store.clock import to_duration
from treadle_store.tables import adapter_files, adapters, leases, quotas, runs, snapshots, tenants
from treadle_store.upsert import insert_or_update

Kind = Literal["training", "sampling"]

MINUTE_US: Final = 60_000_000
MAX_LIMIT: Final = 2**53
# When what does not pass with time may be asked again: somebody else may have made room.
_ROOM_SECONDS: Final = 60.0
_LEASE_SECONDS: Final = 2.0
_LIMITS: Final = (
    "max_runs",
    "max_active_runs",
    "max_unfinished_operations",
    "training_tokens_per_minute",
    "sampling_tokens_per_minute",
    "max_stored_bytes",
)
_FETCH: Final = select(*quotas.c).where(quotas.c.tenant == bindparam("of_tenant"))
_LOCK: Final = _FETCH.with_for_update()
_LOCK_ALL: Final = (
    select(*quotas.c)
    .where(quotas.c.tenant.in_(bindparam("of_tenants", expanding=True)))
    .order_by(quotas.c.tenant)
    .with_for_update()
)
_PAY: Final = {
    "training": update(quotas)
    .where(quotas.c.tenant == bindparam("of_tenant"))
    .values(training_paid_us=bindparam("paid")),
    "sampling": update(quotas)
    .where(quotas.c.tenant == bindparam("of_tenant"))
    .values(sampling_paid_us=bindparam("paid")),
}

# Columns come and go with the query; SQLAlchemy types a row by its tuple, which would say less than the names do.
QuotaRow = Row[*tuple[object, ...]]


def set_quota(connection: Connection, tenant: str, quota: admin_pb2.Quota, now_us: int) -> admin_pb2.Quota:
    """Replaces a tenant's quota; tokens that it owes stay owed, at the new rate. TENANT_NOT_FOUND, BAD_VALUE."""
    _require_tenant(connection, tenant)
    limits = {name: getattr(quota, name) if quota.HasField(name) else None for name in _LIMITS}
    for name, limit in limits.items():
        if limit is not None and limit > MAX_LIMIT:
            raise make_error("BAD_VALUE", f"{name} is beyond 2^53; leave it unset for no limit")
        if limit == 0 and name.endswith("per_minute"):
            raise make_error("BAD_VALUE", f"{name} must be at least 1; revoke the keys, or their scope, to stop it")
    before = connection.execute(_LOCK, {"of_tenant": tenant}).one_or_none()
    row: dict[str, object] = {"tenant": tenant, "training_paid_us": 0, "sampling_paid_us": 0, **limits}
    if before is not None:
        training = (before.training_paid_us, before.training_tokens_per_minute, limits["training_tokens_per_minute"])
        sampling = (before.sampling_paid_us, before.sampling_tokens_per_minute, limits["sampling_tokens_per_minute"])
        row |= {"training_paid_us": _at_rate(*training, now_us), "sampling_paid_us": _at_rate(*sampling, now_us)}
    insert_or_update(connection, quotas, [row], replace=(*_LIMITS, "training_paid_us", "sampling_paid_us"))
    return get_quota(connection, tenant)


def get_quota(connection: Connection, tenant: str) -> admin_pb2.Quota:
    """Returns a tenant's quota. Raises TENANT_NOT_FOUND."""
    _require_tenant(connection, tenant)
    row = connection.execute(_FETCH, {"of_tenant": tenant}).one_or_none()
    quota = admin_pb2.Quota()
    for name in _LIMITS if row is not None else ():
        limit = getattr(row, name)
        if limit is not None:
            setattr(quota, name, limit)
    return quota


def budget_of(connection: Connection, tenant: str, now_us: int) -> usage_pb2.Budget:
    """Returns what a tenant may use now; one without a quota, or without a name, has no limits."""
    row = connection.execute(_FETCH, {"of_tenant": tenant}).one_or_none()
    return usage_pb2.Budget(tenant=tenant) if row is None else _to_budget(row._asdict(), now_us)


def charge(connection: Connection, kind: Kind, tokens: Mapping[str, int], now_us: int) -> dict[str, usage_pb2.Budget]:
    """Takes tokens from tenants' buckets, into debt if need be; returns the budgets of those that have a quota."""
    budgets: dict[str, usage_pb2.Budget] = {}
    payments: list[dict[str, object]] = []
    paid_column, rate_column = f"{kind}_paid_us", f"{kind}_tokens_per_minute"
    for row in connection.execute(_LOCK_ALL, {"of_tenants": list(tokens)}):
        values = row._asdict()
        rate = values[rate_column]
        if rate and tokens[row.tenant]:
            paid_us = max(values[paid_column], now_us - MINUTE_US) + tokens[row.tenant] * MINUTE_US // rate
            values[paid_column] = min(paid_us, 2**62)
            payments.append({"of_tenant": row.tenant, "paid": values[paid_column]})
        budgets[row.tenant] = _to_budget(values, now_us)
    if payments:
        connection.execute(_PAY[kind], payments)
    return budgets


def check_new_run(connection: Connection, tenant: str) -> None:
    """Raises QUOTA_EXCEEDED when the tenant has as many runs as it may."""
    limit = _limit(connection, tenant, "max_runs")
    if limit is not None and count_runs(connection, tenant) >= limit:
        raise make_error("QUOTA_EXCEEDED", f"you have {limit} runs, as many as you may: delete one", _ROOM_SECONDS)


def check_active_run(connection: Connection, name: RunName, now_us: int) -> None:
    """Raises RATE_LIMITED when trainers hold as many other runs of the tenant as they may."""
    limit = _limit(connection, name.tenant, "max_active_runs")
    if limit is None:
        return
    others = select(func.count()).where(_active(name.tenant, now_us), leases.c.run != name.run)
    if connection.execute(others).scalar_one() >= limit:
        raise make_error(
            "RATE_LIMITED",
            f"{limit} runs of yours are active, as many as may be: {name} waits until one has been idle for a while",
            _LEASE_SECONDS,
        )


def stored_bytes(connection: Connection, tenant: str) -> int:
    """Returns the bytes of a tenant's saved adapters that are not deleted, its runs' snapshots and its completions."""
    same = and_(
        adapters.c.tenant == adapter_files.c.tenant,
        adapters.c.run == adapter_files.c.run,
        adapters.c.kind == adapter_files.c.kind,
        adapters.c.adapter == adapter_files.c.adapter,
    )
    saved = (
        select(func.sum(adapter_files.c.size))
        .select_from(adapter_files.join(adapters, same))
        .where(adapter_files.c.tenant == tenant, adapters.c.deleted_us.is_(None))
    )
    snapped = select(func.sum(snapshots.c.size)).where(snapshots.c.tenant == tenant)
    kept = select(tenants.c.completion_bytes).where(tenants.c.tenant == tenant)
    # PostgreSQL sums into decimals.
    return sum(int(connection.execute(query).scalar_one_or_none() or 0) for query in (saved, snapped, kept))


def storage_limit(connection: Connection, tenant: str, *, lock: bool = True) -> int | None:
    """Returns the bytes that a tenant may store, None for any number; a writer holds other savers of it off."""
    return _limit(connection, tenant, "max_stored_bytes", lock=lock)


def check_storage(connection: Connection, tenant: str, limit: int | None) -> None:
    """Raises QUOTA_EXCEEDED when the tenant stores more than `limit`."""
    if limit is None:
        return
    stored = stored_bytes(connection, tenant)
    if stored > limit:
        raise make_error(
            "QUOTA_EXCEEDED",
            f"this would make {stored} bytes of adapters, snapshots and completions, and you may store {limit}: "
            "delete revisions, checkpoints, runs or completions that you no longer need",
            _ROOM_SECONDS,
        )


def count_runs(connection: Connection, tenant: str) -> int:
    """Returns how many runs of a tenant exist."""
    return connection.execute(select(func.count()).where(runs.c.tenant == tenant)).scalar_one()


def count_active_runs(connection: Connection, tenant: str, now_us: int) -> int:
    """Returns how many runs of a tenant are held by a trainer."""
    return connection.execute(select(func.count()).where(_active(tenant, now_us))).scalar_one()


def budgets_of(connection: Connection, names: Sequence[str], now_us: int) -> list[usage_pb2.Budget]:
    """Returns what each of the tenants may use now."""
    return [budget_of(connection, tenant, now_us) for tenant in names]


def _at_rate(paid_us: int, old: int | None, new: int | None, now_us: int) -> int:
    """Returns when the same tokens are paid for at another rate; without a rate nothing is owed."""
    if not old or not new:
        return 0
    return min(now_us + (max(paid_us, now_us - MINUTE_US) - now_us) * old // new, 2**62)


def _active(tenant: str, now_us: int) -> ColumnElement[bool]:
    return and_(leases.c.tenant == tenant, leases.c.holder != "", leases.c.expires_us > now_us)


def _limit(connection: Connection, tenant: str, name: str, *, lock: bool = True) -> int | None:
    row = connection.execute(_LOCK if lock else _FETCH, {"of_tenant": tenant}).one_or_none()
    limit: int | None = None if row is None else getattr(row, name)
    return limit


def _require_tenant(connection: Connection, tenant: str) -> None:
    if not connection.execute(select(exists().where(tenants.c.tenant == tenant))).scalar_one():
        raise make_error("TENANT_NOT_FOUND", f"there is no tenant {tenant[:40]!r}")


def _to_budget(row: Mapping[str, Any], now_us: int) -> usage_pb2.Budget:
    return usage_pb2.Budget(
        tenant=row["tenant"],
        training=_to_allowance(row["training_tokens_per_minute"], row["training_paid_us"], now_us),
        sampling=_to_allowance(row["sampling_tokens_per_minute"], row["sampling_paid_us"], now_us),
        max_unfinished_operations=row["max_unfinished_operations"] or 0,
    )


def _to_allowance(rate: int | None, paid_us: int, now_us: int) -> usage_pb2.Allowance:
    debt_us = max(paid_us - now_us, -MINUTE_US)
    # Durations end at ten thousand years; nobody waits for that long.
    return usage_pb2.Allowance(tokens_per_minute=rate or 0, debt=to_duration(min(debt_us, 2**53)))
