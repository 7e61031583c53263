"""The exactly-once protocol: leases with a fencing epoch, snapshots, recovery.

How operations and results are written is in `journal_entries`. Bodies for Database.read and Database.write; each runs
in one transaction, so that the epoch that is checked is the epoch under which is written. Invariants:

- ops are appended without gaps; the same seq with the same digest is the same op;
- a result is written once and never changed; `last_done_seq` is the end of the gapless results;
- rows up to min(snapshot.seq, acked_seq) are dropped; payloads up to snapshot.seq are dropped.

Knows nothing of what an operation does.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from sqlalchemy import ColumnElement, Connection, and_, bindparam, delete, insert, select, tuple_, update

from treadle.errors import TreadleError, make_error
from treadle.internal.v1 import journal_pb2
from treadle.names import RunName
from treadle.v1 import training_pb2
from treadle_store import quotas
from treadle_store.catalog import RunRow, fetch_run, lock_leased_run, lock_run, to_run
from treadle_store.clock import to_duration, to_timestamp
from treadle_store.tables import leases, ops, results, runs, snapshots

# Built once: every acknowledgement needs them.
_COVERED: Final = select(snapshots.c.tenant, snapshots.c.run, snapshots.c.seq).where(
    tuple_(snapshots.c.tenant, snapshots.c.run).in_(bindparam("of_runs", expanding=True))
)
_DROP_OPS: Final = delete(ops).where(
    ops.c.tenant == bindparam("of_tenant"), ops.c.run == bindparam("of_run"), ops.c.seq <= bindparam("end")
)


@dataclass(frozen=True, slots=True)
class Claim:
    """Who wants a run, and for how long."""

    run: RunName
    holder: str
    address: str
    ttl_us: int


def claim_run(connection: Connection, claim: Claim, now_us: int) -> journal_pb2.ClaimRunResponse:
    """Gives the lease to the claimant with the next epoch. Raises RUN_NOT_FOUND, LEASE_HELD or RATE_LIMITED."""
    row = lock_run(connection, claim.run)
    if row.epoch is not None and row.expires_us > now_us and row.holder not in ("", claim.holder):
        wait_us = row.expires_us - now_us
        raise make_error(
            "LEASE_HELD", f"{claim.run} is held by {row.holder} for {wait_us / 1e6:.1f} s more", wait_us / 1e6
        )
    quotas.check_active_run(connection, claim.run, now_us)
    epoch = (row.epoch or 0) + 1
    values = {"holder": claim.holder, "address": claim.address, "epoch": epoch, "expires_us": now_us + claim.ttl_us}
    if row.epoch is None:
        connection.execute(insert(leases).values(tenant=claim.run.tenant, run=claim.run.run, **values))
    else:
        connection.execute(update(leases).where(_lease_of(claim.run)).values(**values))
    row = fetch_run(connection, claim.run)
    return journal_pb2.ClaimRunResponse(
        run=to_run(row, now_us),
        lease=to_lease(row, now_us),
        from_adapter=row.from_adapter,
        budget=quotas.budget_of(connection, claim.run.tenant, now_us),
    )


def to_lease(row: RunRow, now_us: int) -> journal_pb2.Lease:
    """Returns the lease in a row of fetch_run; an empty one when the run was never claimed."""
    if row.epoch is None:
        return journal_pb2.Lease()
    return journal_pb2.Lease(
        holder=row.holder, address=row.address, epoch=row.epoch, remaining=to_duration(row.expires_us - now_us)
    )


def renew_leases(connection: Connection, holder: str, ttl_us: int, now_us: int) -> dict[str, int]:
    """Extends all leases of a holder, expired ones that nobody took included; returns run name -> epoch."""
    own = leases.c.holder == holder
    connection.execute(update(leases).where(own).values(expires_us=now_us + ttl_us))
    rows = connection.execute(select(leases.c.tenant, leases.c.run, leases.c.epoch).where(own))
    return {str(RunName(row.tenant, row.run)): row.epoch for row in rows}


def release_run(connection: Connection, name: RunName, epoch: int) -> None:
    """Frees the lease if it still has this epoch. The epoch stays: the next claim continues from it."""
    row = connection.execute(select(leases.c.epoch).where(_lease_of(name)).with_for_update()).one_or_none()
    if row is not None and row.epoch == epoch:
        connection.execute(update(leases).where(_lease_of(name)).values(holder="", address="", expires_us=0))


def check_epoch(connection: Connection, name: RunName, epoch: int, *, lock: bool = True) -> RunRow:
    """Returns the run's row if its lease has this epoch; else raises STALE_LEASE or RUN_NOT_FOUND.

    Locked, so that the epoch still holds when the transaction commits; a reader, who has one view, needs no lock.
    """
    row = lock_leased_run(connection, name, epoch) if lock else fetch_run(connection, name)
    if row is not None and row.epoch == epoch and row.holder:
        return row
    raise stale_lease(connection, name, epoch)


def stale_lease(connection: Connection, name: RunName, epoch: int) -> TreadleError:
    """Returns the error for a write under an epoch that is over. Raises RUN_NOT_FOUND."""
    there = fetch_run(connection, name)
    return make_error(
        "STALE_LEASE",
        f"{name} is at epoch {there.epoch or 0}, this worker writes with {epoch}; drop the run and claim it again",
    )


def read_result(connection: Connection, name: RunName, seq: int) -> bytes:
    """Returns a serialized OperationResult, empty while there is none. Raises OPERATION_NOT_FOUND or RESULT_GONE."""
    row = fetch_run(connection, name)
    if not 1 <= seq <= row.last_seq:
        raise make_error("OPERATION_NOT_FOUND", f"{name} has no operation {seq}; its last is {row.last_seq}")
    here = (ops.c.tenant == name.tenant, ops.c.run == name.run, ops.c.seq == seq)
    joined = ops.outerjoin(results, _same_op())
    found = connection.execute(select(results.c.result).select_from(joined).where(*here)).one_or_none()
    if found is None:
        raise make_error("RESULT_GONE", f"the result of operation {seq} of {name} was acknowledged and dropped")
    return found.result or b""


def write_snapshot(connection: Connection, name: RunName, epoch: int, snapshot: journal_pb2.Snapshot) -> None:
    """Records a snapshot whose blob is stored and drops what it covers; an older one than the newest changes nothing.

    Raises STALE_LEASE, RUN_NOT_FOUND, or SEQ_GAP when it covers operations without a result.
    """
    row = check_epoch(connection, name, epoch)
    if snapshot.seq > row.last_done_seq:
        raise make_error(
            "SEQ_GAP",
            f"the snapshot covers {snapshot.seq}, but results of {name} end at {row.last_done_seq}; record them first",
        )
    here = and_(snapshots.c.tenant == name.tenant, snapshots.c.run == name.run)
    newest = connection.execute(select(snapshots.c.seq).where(here)).scalar_one_or_none()
    if newest is not None and newest > snapshot.seq:
        return
    connection.execute(delete(snapshots).where(here))
    connection.execute(
        insert(snapshots).values(
            tenant=name.tenant,
            run=name.run,
            seq=snapshot.seq,
            step=snapshot.step,
            sha256=snapshot.sha256,
            size=snapshot.size,
            state_digest=snapshot.state_digest,
        )
    )
    covered = (ops.c.tenant == name.tenant, ops.c.run == name.run, ops.c.seq <= snapshot.seq)
    connection.execute(update(ops).where(*covered).values(payload=None, payload_sha256=None))
    truncate(connection, {name: row.acked_seq})


def mark_diverged(
    connection: Connection, name: RunName, epoch: int, divergence: training_pb2.Divergence, now_us: int
) -> None:
    """Marks a run as diverged and keeps what was found; a second mark changes nothing.

    Raises STALE_LEASE or RUN_NOT_FOUND.
    """
    row = check_epoch(connection, name, epoch)
    if row.state == training_pb2.RUN_STATE_DIVERGED:
        return
    kept = training_pb2.Divergence()
    kept.CopyFrom(divergence)
    kept.found.CopyFrom(to_timestamp(now_us))
    here = (runs.c.tenant == name.tenant, runs.c.run == name.run)
    values = {"state": training_pb2.RUN_STATE_DIVERGED, "divergence": kept.SerializeToString()}
    connection.execute(update(runs).where(*here).values(**values))


def recovery_header(connection: Connection, name: RunName, epoch: int) -> journal_pb2.RecoveryHeader:
    """Returns where a recovery starts. Raises STALE_LEASE or RUN_NOT_FOUND."""
    row = check_epoch(connection, name, epoch, lock=False)
    header = journal_pb2.RecoveryHeader(acked_seq=row.acked_seq, last_seq=row.last_seq)
    here = (snapshots.c.tenant == name.tenant, snapshots.c.run == name.run)
    found = connection.execute(select(*snapshots.c).where(*here)).one_or_none()
    if found is not None:
        header.snapshot.CopyFrom(
            journal_pb2.Snapshot(
                seq=found.seq,
                step=found.step,
                sha256=found.sha256,
                size=found.size,
                state_digest=found.state_digest,
            )
        )
    return header


def recovery_page(
    connection: Connection, name: RunName, epoch: int, after_seq: int, limit: int
) -> list[journal_pb2.JournaledOperation]:
    """Returns the next operations that a recovery needs, in order; an empty page is the end. Raises STALE_LEASE."""
    check_epoch(connection, name, epoch, lock=False)
    query = (
        select(*ops.c, results.c.result, results.c.state_digest)
        .select_from(ops.outerjoin(results, _same_op()))
        .where(ops.c.tenant == name.tenant, ops.c.run == name.run, ops.c.seq > after_seq)
        .order_by(ops.c.seq)
        .limit(limit)
    )
    return [
        journal_pb2.JournaledOperation(
            seq=row.seq,
            digest=row.digest % 2**64,
            payload=row.payload or b"",
            payload_sha256=row.payload_sha256 or "",
            result=row.result or b"",
            state_digest=row.state_digest or b"",
        )
        for row in connection.execute(query)
    ]


def truncate(connection: Connection, delivered: Mapping[RunName, int]) -> None:
    """Drops operations that their run's newest snapshot covers and whose results were delivered, up to these seqs."""
    these = [(name.tenant, name.run) for name in delivered]
    covered = connection.execute(_COVERED, {"of_runs": these})
    ends = [
        {"of_tenant": row.tenant, "of_run": row.run, "end": min(row.seq, delivered[RunName(row.tenant, row.run)])}
        for row in covered
    ]
    if ends:
        connection.execute(_DROP_OPS, ends)


def _same_op() -> ColumnElement[bool]:
    return and_(results.c.tenant == ops.c.tenant, results.c.run == ops.c.run, results.c.seq == ops.c.seq)


def _lease_of(name: RunName) -> ColumnElement[bool]:
    return and_(leases.c.tenant == name.tenant, leases.c.run == name.run)
