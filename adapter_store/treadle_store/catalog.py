"""Runs in the catalog: registering, looking up, listing, removing.

Bodies for Database.read and Database.write. Knows nothing of operations (see journal) and takes the time as an
argument.
"""

import hashlib
import json
import math
import secrets
from collections.abc import Mapping
from typing import Final

from sqlalchemy import Connection, Row, Select, and_, bindparam, delete, insert, or_, select, tuple_

from treadle.errors import make_error
from treadle.names import RunName, check_id, check_tenant, parse_adapter
from treadle.v1 import metrics_pb2, training_pb2, types_pb2
from treadle_store import adapters, quotas
from treadle_store.clock import to_timestamp
from treadle_store.pages import PageRequest, decode_token, encode_token
from treadle_store.tables import leases, metrics, runs

MAX_RANK: Final = 512
DEFAULT_RANK: Final = 32
DEFAULT_ALPHA: Final = 32.0
MAX_REQUEST_ID_CHARS: Final = 128
_ID_ALPHABET: Final = "abcdefghijklmnopqrstuvwxyz234567"

# Columns come and go with the query; SQLAlchemy types a row by its tuple, which would say less than the names do.
RunRow = Row[*tuple[object, ...]]


def register_run(
    connection: Connection, tenant: str, request: training_pb2.CreateRunRequest, now_us: int
) -> tuple[training_pb2.Run, bool]:
    """Adds a run, or finds the one that the same request made; returns it and whether it was there.

    Raises BAD_NAME, BAD_VALUE, BAD_LORA_CONFIG, UNKNOWN_BASE, REQUEST_ID_REUSED, RUN_EXISTS, ADAPTER_NOT_FOUND,
    INCOMPATIBLE_ADAPTER or QUOTA_EXCEEDED.
    """
    check_tenant(tenant)
    _check_request(request)
    content = hashlib.sha256(request.SerializeToString(deterministic=True)).hexdigest()
    if request.request_id:
        same_id = _select_runs().where(runs.c.tenant == tenant, runs.c.request_id == request.request_id)
        row = connection.execute(same_id).one_or_none()
        if row is not None and row.request_sha256 != content:
            raise make_error(
                "REQUEST_ID_REUSED",
                f"request_id {request.request_id!r} made another run already; use a fresh one for a new run",
            )
        if row is not None:
            return to_run(row, now_us), True
    quotas.check_new_run(connection, tenant)
    base, lora = _shape(connection, tenant, request, now_us)
    name = RunName(tenant, request.run_id or "r-" + "".join(secrets.choice(_ID_ALPHABET) for _ in range(10)))
    if connection.execute(_FETCH_RUN, {"of_tenant": tenant, "of_run": name.run}).one_or_none() is not None:
        raise make_error("RUN_EXISTS", f"there is a run {name} already; use another run_id")
    connection.execute(
        insert(runs).values(
            tenant=tenant,
            run=name.run,
            base=base,
            lora=lora.SerializeToString(),
            metadata=json.dumps(dict(request.metadata), sort_keys=True),
            request_id=request.request_id or None,
            request_sha256=content,
            from_adapter=request.from_adapter,
            state=training_pb2.RUN_STATE_ACTIVE,
            last_seq=0,
            last_done_seq=0,
            acked_seq=0,
            created_us=now_us,
        )
    )
    return to_run(fetch_run(connection, name), now_us), False


def fetch_run(connection: Connection, name: RunName) -> RunRow:
    """Returns the run's row joined with its lease, or raises RUN_NOT_FOUND."""
    row = connection.execute(_FETCH_RUN, {"of_tenant": name.tenant, "of_run": name.run}).one_or_none()
    if row is None:
        raise run_not_found(name)
    return row


def run_not_found(name: RunName) -> Exception:
    """Returns the error for a run that does not exist or is somebody else's: one answer for both."""
    return make_error("RUN_NOT_FOUND", f"there is no run {name}; ListRuns shows yours")


def scan_runs(
    connection: Connection, tenant: str, page: PageRequest, now_us: int
) -> tuple[list[training_pb2.Run], str]:
    """Returns a page of the tenant's runs, newest first, and the token of the next. Raises BAD_PAGE_TOKEN."""
    query = _select_runs().where(runs.c.tenant == tenant)
    if page.token:
        created_us, (run,) = decode_token(page.token, 1)
        older = or_(runs.c.created_us < created_us, and_(runs.c.created_us == created_us, runs.c.run < run))
        query = query.where(older)
    query = query.order_by(runs.c.created_us.desc(), runs.c.run.desc()).limit(page.limit + 1)
    rows = connection.execute(query).all()
    shown = rows[: page.limit]
    token = encode_token(shown[-1].created_us, [shown[-1].run]) if len(rows) > page.limit else ""
    return [to_run(row, now_us) for row in shown], token


def remove_run(connection: Connection, name: RunName) -> None:
    """Removes a run with its lease, journal and snapshot; its saved adapters stay. Raises RUN_NOT_FOUND."""
    removed = connection.execute(delete(runs).where(runs.c.tenant == name.tenant, runs.c.run == name.run))
    if removed.rowcount == 0:
        raise run_not_found(name)


def to_run(row: RunRow, now_us: int) -> training_pb2.Run:
    """Returns a row of fetch_run as a message; the worker is named while its lease lasts."""
    held = row.epoch is not None and row.expires_us > now_us
    return training_pb2.Run(
        name=str(RunName(row.tenant, row.run)),
        base=row.base,
        lora=types_pb2.LoraConfig.FromString(row.lora),
        created=to_timestamp(row.created_us),
        next_seq=row.last_seq + 1,
        last_done_seq=row.last_done_seq,
        metadata=json.loads(row.metadata),
        worker=row.holder if held else "",
        epoch=row.epoch or 0,
        state=row.state,
        divergence=training_pb2.Divergence.FromString(row.divergence) if row.divergence else None,
        latest=metrics_pb2.MetricPoint.FromString(row.latest) if row.latest else None,
    )


def lock_run(connection: Connection, name: RunName) -> RunRow:
    """Returns the row of fetch_run as it is once this transaction alone may change it. Raises RUN_NOT_FOUND."""
    this = {"of_tenant": name.tenant, "of_run": name.run}
    connection.execute(_LOCK_RUN, this)
    connection.execute(_LOCK_LEASE, this)
    # A statement of its own, because one that waits for a lock shows the other table as it was before the wait.
    return fetch_run(connection, name)


def lock_leased_run(connection: Connection, name: RunName, epoch: int) -> RunRow | None:
    """Returns the row of fetch_run if its lease is held with this epoch, None otherwise; checked under its lock.

    Until the transaction ends nobody can claim the run, give it back or remove it.
    """
    return lock_leased_runs(connection, {name: epoch}).get(name)


def lock_leased_runs(connection: Connection, epochs: Mapping[RunName, int]) -> dict[RunName, RunRow]:
    """Returns those of the runs whose leases are held with these epochs, each as `lock_leased_run` does.

    One statement locks runs and leases, in order of their names, and compares the epochs with the leases as they are
    once locked.
    """
    wanted = [(name.tenant, name.run, min(epoch, 2**63 - 1)) for name, epoch in epochs.items()]
    rows = connection.execute(_LOCK_LEASED_RUNS, {"of_runs": wanted})
    return {RunName(row.tenant, row.run): row for row in rows}


_LEASE_COLUMNS: Final = (leases.c.holder, leases.c.address, leases.c.epoch, leases.c.expires_us)
_HAS_LEASE: Final = and_(leases.c.tenant == runs.c.tenant, leases.c.run == runs.c.run)
_NEWEST_STEP: Final = and_(
    metrics.c.tenant == runs.c.tenant,
    metrics.c.run == runs.c.run,
    metrics.c.source == metrics_pb2.METRIC_SOURCE_SERVICE,
    metrics.c.step == runs.c.last_step,
)


def _select_runs() -> Select[*tuple[object, ...]]:
    columns = (*runs.c, *_LEASE_COLUMNS, metrics.c.point.label("latest"))
    return select(*columns).select_from(runs.outerjoin(leases, _HAS_LEASE).outerjoin(metrics, _NEWEST_STEP))


# Built once: putting a statement together costs more than running it, and every journal write needs this one.
_THIS_RUN: Final = and_(runs.c.tenant == bindparam("of_tenant"), runs.c.run == bindparam("of_run"))
_FETCH_RUN: Final = _select_runs().where(_THIS_RUN)
_LOCK_RUN: Final = select(runs.c.run).where(_THIS_RUN).with_for_update()
_LOCK_LEASE: Final = (
    select(leases.c.run)
    .where(leases.c.tenant == bindparam("of_tenant"), leases.c.run == bindparam("of_run"))
    .with_for_update()
)
_LOCK_LEASED_RUNS: Final = (
    select(*runs.c, *_LEASE_COLUMNS)
    .select_from(runs.join(leases, _HAS_LEASE))
    .where(
        tuple_(leases.c.tenant, leases.c.run, leases.c.epoch).in_(bindparam("of_runs", expanding=True)),
        leases.c.holder != "",
    )
    .order_by(runs.c.tenant, runs.c.run)
    .with_for_update(of=[runs, leases])
)


def _check_request(request: training_pb2.CreateRunRequest) -> None:
    if len(request.request_id) > MAX_REQUEST_ID_CHARS:
        raise make_error("BAD_VALUE", f"request_id is longer than {MAX_REQUEST_ID_CHARS} characters")
    adapters.check_metadata(request.metadata)
    if request.run_id:
        check_id(request.run_id)


def _shape(
    connection: Connection, tenant: str, request: training_pb2.CreateRunRequest, now_us: int
) -> tuple[str, types_pb2.LoraConfig]:
    """Returns the base and the LoRA config of a new run, from the request or from the adapter that it starts from."""
    if not request.from_adapter:
        if not request.base:
            raise make_error("UNKNOWN_BASE", "CreateRun needs a base; GetCapabilities lists those that are served")
        return request.base, _with_defaults(request.lora)
    name = parse_adapter(request.from_adapter)
    adapter = adapters.fetch_adapter(connection, name, reader=tenant)
    given, has = request.lora, adapter.lora
    if request.base not in ("", adapter.base):
        raise make_error(
            "INCOMPATIBLE_ADAPTER", f"{name} belongs to the base {adapter.base!r}, not to {request.base!r}"
        )
    differs = (given.HasField("rank") and given.rank != has.rank) or (
        given.HasField("alpha") and given.alpha != has.alpha
    )
    # A config that says nothing at all takes the adapter's; one that says something must say the same.
    skips = (given.skip_attn, given.skip_mlp, given.skip_unembed) != (has.skip_attn, has.skip_mlp, has.skip_unembed)
    if given != types_pb2.LoraConfig(seed=given.seed) and (differs or skips):
        raise make_error(
            "INCOMPATIBLE_ADAPTER",
            f"{name} has rank {has.rank}, alpha {has.alpha:g} and its own set of layers; leave lora unset to take them",
        )
    return adapter.base, has


def _with_defaults(given: types_pb2.LoraConfig) -> types_pb2.LoraConfig:
    lora = types_pb2.LoraConfig()
    lora.CopyFrom(given)
    lora.rank = given.rank if given.HasField("rank") else DEFAULT_RANK
    lora.alpha = given.alpha if given.HasField("alpha") else DEFAULT_ALPHA
    if not 1 <= lora.rank <= MAX_RANK:
        raise make_error("BAD_LORA_CONFIG", f"rank {lora.rank} is out of range; use 1 to {MAX_RANK}")
    if not (math.isfinite(lora.alpha) and lora.alpha > 0):
        raise make_error("BAD_LORA_CONFIG", f"alpha {lora.alpha} is out of range; use a finite number above 0")
    if lora.skip_attn and lora.skip_mlp and lora.skip_unembed:
        raise make_error("BAD_LORA_CONFIG", "nothing is left to train: unset one of skip_attn, skip_mlp, skip_unembed")
    return lora
