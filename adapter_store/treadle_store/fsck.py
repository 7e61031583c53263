"""Proves a store consistent: rows with each other, rows with blobs, contents with their hashes. Changes nothing.

Rows are read in one view, so that a store may go on working meanwhile; a blob that is missing counts only if a row of
a later view still names it. Knows the journal's invariants, not what operations do.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import xxhash
from google.protobuf.message import DecodeError
from sqlalchemy import Connection, Row, and_, exists, func, select, text

from treadle.errors import TreadleError
from treadle.names import AdapterName, RunName
from treadle.v1 import training_pb2
from treadle_store.blobs import BlobStore
from treadle_store.engines import SQLITE, Engines, schema_versions
from treadle_store.sweep import used_blobs
from treadle_store.tables import adapter_files, adapters, completions, leases, ops, results, runs, snapshots, tenants

READ_BYTES: Final = 4 * 2**20
# Rows of one fetch; an operation has up to 1 MiB.
FETCH_ROWS: Final = 32
AnyRow = Row[*tuple[object, ...]]


class BlobUse(NamedTuple):
    """A blob that a row names, and its length if the row says it."""

    where: str
    sha256: str
    size: int | None


@dataclass(slots=True)
class Report:
    """What was looked at and what is wrong with it."""

    problems: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, where: object, what: str) -> None:
        """Notes a problem."""
        self.problems.append(f"{where}: {what}")


def check_store(engines: Engines, blobs: BlobStore, *, read_contents: bool = True) -> Report:
    """Checks everything; `read_contents` hashes every blob that a row names."""
    report = Report()
    found, known = schema_versions(engines.reader)
    if found != known:
        report.add("schema", f"is at version {found or 'none'}, this release uses {known}")
        return report
    with engines.reader.begin() as connection:
        if engines.kind == SQLITE:
            _check_sqlite(connection, report)
        _check_runs(connection, report)
        _check_operations(connection, report)
        _check_adapters(connection, report)
        _check_completions(connection, report)
        uses = list(blob_uses(connection))
    _check_blobs(engines, blobs, uses, report, read_contents=read_contents)
    return report


def blob_uses(connection: Connection) -> Iterator[BlobUse]:
    """Yields every blob that a row names."""
    for row in connection.execute(select(*ops.c).where(ops.c.payload_sha256.is_not(None))):
        yield BlobUse(f"operation {row.seq} of {RunName(row.tenant, row.run)}", row.payload_sha256, None)
    for row in connection.execute(select(*snapshots.c)):
        yield BlobUse(f"snapshot of {RunName(row.tenant, row.run)}", row.sha256, row.size)
    for row in connection.execute(select(*adapter_files.c)):
        name = AdapterName(row.tenant, row.run, row.kind, row.adapter)
        yield BlobUse(f"{row.path} of {name}", row.sha256, row.size)


def _check_sqlite(connection: Connection, report: Report) -> None:
    for (line,) in connection.execute(text("PRAGMA integrity_check")):
        if line != "ok":
            report.add("SQLite file", str(line))
    for row in connection.execute(text("PRAGMA foreign_key_check")):
        report.add(f"table {row[0]}", f"row {row[1]} refers to a row of {row[2]} that is not there")


def _check_runs(connection: Connection, report: Report) -> None:
    query = (
        select(*runs.c, leases.c.epoch, snapshots.c.seq.label("covered"), snapshots.c.state_digest)
        .select_from(
            runs.outerjoin(leases, and_(leases.c.tenant == runs.c.tenant, leases.c.run == runs.c.run)).outerjoin(
                snapshots, and_(snapshots.c.tenant == runs.c.tenant, snapshots.c.run == runs.c.run)
            )
        )
        .order_by(runs.c.tenant, runs.c.run)
    )
    rows = connection.execute(query).all()
    report.counts["runs"] = len(rows)
    for row in rows:
        name = RunName(row.tenant, row.run)
        if not 0 <= row.acked_seq <= row.last_done_seq <= row.last_seq:
            report.add(name, f"acked {row.acked_seq}, done {row.last_done_seq}, last {row.last_seq} are out of order")
        if row.epoch is None and row.last_seq:
            report.add(name, "has operations but never had a lease")
        if row.epoch is not None and row.epoch < 1:
            report.add(name, f"has the epoch {row.epoch}; epochs begin at 1")
        if row.covered is not None and not 0 <= row.covered <= row.last_done_seq:
            report.add(name, f"has a snapshot of {row.covered}, but results end at {row.last_done_seq}")
        if row.covered is not None and len(row.state_digest) not in (0, 16):
            report.add(name, f"has a snapshot with a state digest of {len(row.state_digest)} bytes")
        _check_start(connection, row, name, report)


def _check_start(connection: Connection, row: AnyRow, name: RunName, report: Report) -> None:
    """A run without a snapshot must find the adapter that it started from."""
    if row.covered is not None or not row.from_adapter:
        return
    parts = row.from_adapter.split("/")
    keys = dict(zip(("tenant", "run", "kind", "adapter"), (parts[1], parts[3], parts[4], parts[5]), strict=True))
    if not connection.execute(select(exists().where(*(adapters.c[k] == v for k, v in keys.items())))).scalar_one():
        report.add(name, f"starts from {row.from_adapter}, which is not there")


def _check_operations(connection: Connection, report: Report) -> None:
    """Compares each run's operations and results with its positions: dense, complete, and what they say they are."""
    query = (
        select(*runs.c[("tenant", "run", "last_seq", "last_done_seq", "acked_seq")], snapshots.c.seq.label("covered"))
        .select_from(
            runs.outerjoin(snapshots, and_(snapshots.c.tenant == runs.c.tenant, snapshots.c.run == runs.c.run))
        )
        .order_by(runs.c.tenant, runs.c.run)
    )
    num_ops = 0
    for run in connection.execute(query).all():
        name, expected = RunName(run.tenant, run.run), min(run.acked_seq, run.covered or 0) + 1
        for op in _operations_of(connection, name):
            num_ops += 1
            if op.seq != expected:
                report.add(name, f"has operation {op.seq} where {expected} should follow")
            expected = op.seq + 1
            _check_operation(op, name, run, report)
        if expected != run.last_seq + 1:
            report.add(name, f"lacks the operations {expected} to {run.last_seq}")
    report.counts["operations"] = num_ops


def _operations_of(connection: Connection, name: RunName) -> Iterator[Any]:  # rows of a join
    same = and_(results.c.tenant == ops.c.tenant, results.c.run == ops.c.run, results.c.seq == ops.c.seq)
    query = (
        select(*ops.c, results.c.result, results.c.state_digest)
        .select_from(ops.outerjoin(results, same))
        .where(ops.c.tenant == name.tenant, ops.c.run == name.run)
        .order_by(ops.c.seq)
    )
    yield from connection.execute(query.execution_options(yield_per=FETCH_ROWS))


def _check_operation(op: Any, name: RunName, run: AnyRow, report: Report) -> None:  # a row of _operations_of
    where = f"operation {op.seq} of {name}"
    if op.seq <= (run.covered or 0):
        if op.payload is not None or op.payload_sha256 is not None:
            report.add(where, "still has a payload although a snapshot covers it")
    elif (op.payload is None) == (op.payload_sha256 is None):
        report.add(where, "must have its payload either in its row or in a blob")
    if op.payload is not None:
        _check_payload(op, where, report)
    if (op.result is None) and op.seq <= run.last_done_seq:
        report.add(where, "counts as done but has no result")
    if op.result is not None and op.seq == run.last_done_seq + 1:
        report.add(where, "has a result but does not count as done")
    if op.result is not None:
        try:
            seq = training_pb2.OperationResult.FromString(op.result).seq
        except DecodeError:
            report.add(where, "has a result that cannot be read")
        else:
            if seq != op.seq:
                report.add(where, f"has the result of operation {seq}")
        if len(op.state_digest) not in (0, 16, 18):
            report.add(where, f"has a state digest of {len(op.state_digest)} bytes")


def _check_payload(op: Any, where: str, report: Report) -> None:  # a row of _operations_of
    try:
        operation = training_pb2.Operation.FromString(op.payload)
    except DecodeError:
        report.add(where, "has a payload that cannot be read")
        return
    kind = operation.WhichOneof("kind")
    if operation.seq != op.seq or kind is None:
        report.add(where, f"has the payload of operation {operation.seq}")
    elif operation.digest:
        body = getattr(operation, kind).SerializeToString(deterministic=True)
        if operation.digest != op.digest % 2**64 or xxhash.xxh3_64_intdigest(body) != operation.digest:
            report.add(where, "has a payload that is not that of its digest")


def _check_adapters(connection: Connection, report: Report) -> None:
    has_file = exists().where(
        *(adapter_files.c[key] == adapters.c[key] for key in ("tenant", "run", "kind", "adapter"))
    )
    for row in connection.execute(select(*adapters.c).where(~has_file)):
        report.add(AdapterName(row.tenant, row.run, row.kind, row.adapter), "has no files")
    report.counts["adapters"] = connection.execute(select(func.count()).select_from(adapters)).scalar_one()


def _check_completions(connection: Connection, report: Report) -> None:
    """Compares what a tenant's completions count for with what they have."""
    counted: dict[str, int] = {}
    query = select(*completions.c[("tenant", "completion", "size", "messages", "response")])
    for row in connection.execute(query.execution_options(yield_per=FETCH_ROWS)):
        counted[row.tenant] = counted.get(row.tenant, 0) + row.size
        if row.size < len(row.messages) + len(row.response):
            report.add(f"completion {row.completion} of {row.tenant}", f"counts as {row.size} bytes, which is too few")
        for name, content in (("messages", row.messages), ("response", row.response)):
            if not _is_json(content):
                report.add(f"completion {row.completion} of {row.tenant}", f"has {name} that are not JSON")
    for row in connection.execute(select(*tenants.c)):
        if row.completion_bytes != counted.get(row.tenant, 0):
            stored = counted.get(row.tenant, 0)
            report.add(f"tenant {row.tenant}", f"counts {row.completion_bytes} bytes of completions and has {stored}")
    report.counts["completions"] = connection.execute(select(func.count()).select_from(completions)).scalar_one()


def _is_json(content: bytes) -> bool:
    try:
        json.loads(content)
    except ValueError:
        return False
    return True


def _check_blobs(
    engines: Engines, blobs: BlobStore, uses: list[BlobUse], report: Report, *, read_contents: bool
) -> None:
    damage: dict[str, list[str]] = {}
    states: dict[str, tuple[int | None, str]] = {}
    for use in uses:
        if use.sha256 not in states:
            states[use.sha256] = _look_at(blobs, use.sha256, read_contents=read_contents)
        size, what = states[use.sha256]
        if not what and use.size not in (None, size):
            what = f"has {size} bytes, its row says {use.size}"
        if what:
            damage.setdefault(use.sha256, []).append(f"{use.where}: blob {use.sha256} {what}")
    # What went away because its row went away is no damage.
    with engines.reader.begin() as connection:
        still_used = used_blobs(connection) if damage else set()
        in_use = used_blobs(connection)
    report.problems += [line for address in damage if address in still_used for line in damage[address]]
    report.counts["blobs"] = len(states)
    report.counts["blobs without a row"] = sum(address not in in_use for address in blobs.addresses())


def _look_at(blobs: BlobStore, sha256: str, *, read_contents: bool) -> tuple[int | None, str]:
    """Returns a blob's length and what is wrong with it."""
    try:
        size = blobs.size_of(sha256)
        if size is None:
            return None, "is not there"
        if not read_contents:
            return size, ""
        digest, offset = hashlib.sha256(), 0
        while data := blobs.read(sha256, offset, READ_BYTES):
            digest.update(data)
            offset += len(data)
    except (TreadleError, OSError) as error:
        return None, f"cannot be read: {error}"
    return offset, "" if digest.hexdigest() == sha256 else "has other content than its address says"
