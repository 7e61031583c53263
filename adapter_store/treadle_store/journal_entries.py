"""Operations and results of many runs, appended and recorded in as few statements as those of one run.

What shares a commit shares its statements: the leases of all runs are locked and checked by one, their operations
inserted by one, and so on. What is wrong with an entry is known before anything of it is written, so an entry fails
alone and the others stand. Bodies for Database.write; the invariants are `journal`'s.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from sqlalchemy import Connection, bindparam, insert, select, tuple_, update

from treadle.errors import TreadleError, make_error
from treadle.internal.v1 import journal_pb2, usage_pb2
from treadle.names import RunName
from treadle_store import metrics, usage
from treadle_store.catalog import RunRow, lock_leased_runs
from treadle_store.journal import stale_lease, truncate
from treadle_store.tables import ops, results, runs
from treadle_store.usage import TrainingUse

_AT_ONCE: Final = 1000
"""Entries that share statements: databases bound the parameters of one."""

# Built once: putting a statement together costs more than running it.
_MOVE_RUN: Final = update(runs).where(runs.c.tenant == bindparam("of_tenant"), runs.c.run == bindparam("of_run"))
_INSERT_OPS: Final = insert(ops)
_INSERT_RESULTS: Final = insert(results)
_RESULTS_AHEAD: Final = (
    select(results.c.tenant, results.c.run, results.c.seq)
    .select_from(results.join(runs, (results.c.tenant == runs.c.tenant) & (results.c.run == runs.c.run)))
    .where(
        tuple_(results.c.tenant, results.c.run).in_(bindparam("of_runs", expanding=True)),
        results.c.seq > runs.c.last_done_seq,
    )
)

Outcome = usage_pb2.Budget | TreadleError | None
# Values of columns, each of its own type.
_Values = metrics.Values


@dataclass(frozen=True, slots=True)
class RunEntry:
    """An entry and the run that it is for, with the time at which it came."""

    name: RunName
    entry: journal_pb2.JournalEntry
    now_us: int


@dataclass(slots=True)
class _Plan:
    """What an entry that is in order will write."""

    here: dict[str, str]
    position: metrics.Columns
    moved: bool
    ops: list[_Values] = field(default_factory=list)
    results: list[_Values] = field(default_factory=list)
    points: list[_Values] = field(default_factory=list)
    delivered: bool = False
    use: TrainingUse | None = None


def write_entries(connection: Connection, entries: Sequence[RunEntry]) -> list[Outcome]:
    """Appends operations and records results with their metrics, of each entry all or none; charges what they cost.

    Returns for each entry what its tenant may still use, None if it was not charged or has no quota, or why nothing
    of it was written: STALE_LEASE, SEQ_GAP, SEQ_REUSED or RUN_NOT_FOUND.
    """
    outcomes: list[Outcome] = [None] * len(entries)
    waiting = list(range(len(entries)))
    while waiting:
        # Of each run one: the next of it stands on what this one has written.
        chosen: dict[RunName, int] = {}
        for place in waiting:
            if len(chosen) < _AT_ONCE:
                chosen.setdefault(entries[place].name, place)
        places = list(chosen.values())
        for place, outcome in zip(places, _write(connection, [entries[place] for place in places]), strict=True):
            outcomes[place] = outcome
        waiting = sorted({*waiting} - {*places})
    return outcomes


def _write(connection: Connection, entries: Sequence[RunEntry]) -> list[Outcome]:
    """Writes entries of different runs."""
    rows = lock_leased_runs(connection, {entry.name: entry.entry.epoch for entry in entries})
    ahead = _find_results_ahead(connection, entries, rows)
    plans: list[_Plan | TreadleError] = []
    for entry in entries:
        row = rows.get(entry.name)
        try:
            if row is None:
                raise stale_lease(connection, entry.name, entry.entry.epoch)
            plans.append(_plan(connection, entry, row, ahead.get(entry.name, set())))
        except TreadleError as error:
            plans.append(error)
    sound = [plan for plan in plans if isinstance(plan, _Plan)]
    _execute(connection, _INSERT_OPS, [values for plan in sound for values in plan.ops])
    _execute(connection, _INSERT_RESULTS, [values for plan in sound for values in plan.results])
    _execute(connection, _MOVE_RUN, [{**plan.position, **plan.here} for plan in sound if plan.moved])
    pairs = list(zip(entries, plans, strict=True))
    delivered = {
        entry.name: plan.position["acked_seq"] for entry, plan in pairs if isinstance(plan, _Plan) and plan.delivered
    }
    points = {entry.name: plan.points for entry, plan in pairs if isinstance(plan, _Plan) and plan.points}
    if points:
        metrics.record_steps(connection, points)
    if delivered:
        truncate(connection, delivered)
    uses = [plan.use for plan in sound if plan.use is not None]
    budgets = usage.record_training(connection, uses, max(entry.now_us for entry in entries)) if uses else {}
    return [
        plan if isinstance(plan, TreadleError) else budgets.get(entry.name.tenant) if plan.use is not None else None
        for entry, plan in pairs
    ]


def _execute(connection: Connection, statement: Any, rows: list[_Values]) -> None:  # an INSERT or an UPDATE
    if rows:
        connection.execute(statement, rows)


def _find_results_ahead(
    connection: Connection, entries: Iterable[RunEntry], rows: Mapping[RunName, RunRow]
) -> dict[RunName, set[int]]:
    """Returns the results beyond the gapless ones, of runs that may have some and are about to get more.

    They exist only where an operation was cancelled or refused before earlier ones finished.
    """
    names = [
        (entry.name.tenant, entry.name.run)
        for entry in entries
        if entry.entry.commits and (row := rows.get(entry.name)) is not None and row.last_done_seq < row.last_seq
    ]
    found: dict[RunName, set[int]] = {}
    if names:
        for row in connection.execute(_RESULTS_AHEAD, {"of_runs": names}):
            found.setdefault(RunName(row.tenant, row.run), set()).add(row.seq)
    return found


def _plan(connection: Connection, entry: RunEntry, row: RunRow, ahead: Collection[int]) -> _Plan:
    """Returns what an entry writes behind the position of its run. Raises SEQ_GAP or SEQ_REUSED."""
    name, message = entry.name, entry.entry
    last_seq, new_ops = _plan_appends(connection, name, row.last_seq, message.appends)
    last_done_seq, fresh = _plan_results(name, last_seq, row.last_done_seq, ahead, message.commits)
    # An ack beyond the results is a client's mistake; it must not drop what is still to come.
    acked_seq = max(row.acked_seq, min(message.acked_seq, last_done_seq))
    points, moved = metrics.plan_steps(name, row, fresh, entry.now_us)
    plan = _Plan(
        here={"of_tenant": name.tenant, "of_run": name.run},
        position={"last_seq": last_seq, "last_done_seq": last_done_seq, "acked_seq": acked_seq, **moved},
        moved=bool(points) or (last_seq, last_done_seq, acked_seq) != (row.last_seq, row.last_done_seq, row.acked_seq),
        ops=new_ops,
        results=[
            {
                "tenant": name.tenant,
                "run": name.run,
                "seq": commit.seq,
                "result": commit.result,
                "state_digest": commit.state_digest,
            }
            for commit in fresh
        ],
        points=points,
        delivered=acked_seq > row.acked_seq,
    )
    if fresh:
        num_tokens, device_us = sum(c.num_tokens for c in fresh), sum(c.device_us for c in fresh)
        plan.use = TrainingUse(name, len(fresh), num_tokens, device_us, entry.now_us)
    return plan


def _plan_appends(
    connection: Connection, name: RunName, last_seq: int, appends: Sequence[journal_pb2.JournalAppend]
) -> tuple[int, list[_Values]]:
    """Returns the last seq behind `last_seq` and the rows up to it; repeats of the same operations are skipped."""
    _check_repeats(connection, name, [append for append in appends if append.seq <= last_seq])
    fresh: list[_Values] = []
    for append in appends:
        if append.seq <= last_seq:
            continue
        if append.seq != last_seq + 1:
            raise make_error("SEQ_GAP", f"{name} expects seq {last_seq + 1}, got {append.seq}; send the missing ones")
        last_seq = append.seq
        fresh.append(
            {
                "tenant": name.tenant,
                "run": name.run,
                "seq": append.seq,
                "digest": _signed(append.digest),
                "payload": None if append.payload_sha256 else append.payload,
                "payload_sha256": append.payload_sha256 or None,
            }
        )
    return last_seq, fresh


def _check_repeats(connection: Connection, name: RunName, repeated: Sequence[journal_pb2.JournalAppend]) -> None:
    for append in repeated:
        here = (ops.c.tenant == name.tenant, ops.c.run == name.run, ops.c.seq == append.seq)
        digest = connection.execute(select(ops.c.digest).where(*here)).scalar_one_or_none()
        if digest is None:
            raise make_error("SEQ_REUSED", f"operation {append.seq} of {name} is done, delivered and dropped")
        if digest != _signed(append.digest):
            raise make_error("SEQ_REUSED", f"seq {append.seq} of {name} was used for another operation")


def _plan_results(
    name: RunName,
    last_seq: int,
    last_done_seq: int,
    ahead: Collection[int],
    commits: Sequence[journal_pb2.JournalCommit],
) -> tuple[int, list[journal_pb2.JournalCommit]]:
    """Returns the new end of the gapless results, and the results that are not there yet."""
    fresh: dict[int, journal_pb2.JournalCommit] = {}
    for commit in commits:
        if not 1 <= commit.seq <= last_seq:
            raise make_error("SEQ_GAP", f"{name} has no operation {commit.seq} to record a result of; append it first")
        if commit.seq > last_done_seq and commit.seq not in ahead:
            fresh.setdefault(commit.seq, commit)
    done = {*ahead, *fresh}
    while last_done_seq + 1 in done:
        last_done_seq += 1
    return last_done_seq, list(fresh.values())


def _signed(digest: int) -> int:
    return digest - 2**64 if digest >= 2**63 else digest
