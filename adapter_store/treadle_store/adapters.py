"""Saved adapters in the catalog: recording, looking up, listing, deleting.

Bodies for Database.read and Database.write. Knows nothing of the files' bytes (see blobs, adapter_files).
"""

import json
from collections.abc import Iterable, Mapping
from typing import Final

from google.protobuf.timestamp_pb2 import Timestamp
from sqlalchemy import ColumnElement, Connection, Row, and_, delete, exists, insert, or_, select, update

from treadle.errors import make_error
from treadle.names import AdapterKind, AdapterName, RunName
from treadle.v1 import adapters_pb2, types_pb2
from treadle_store import quotas
from treadle_store.clock import to_timestamp
from treadle_store.pages import PageRequest, decode_token, encode_token
from treadle_store.tables import adapter_files, adapters, runs, snapshots

MAX_METADATA_ENTRIES: Final = 64
MAX_METADATA_BYTES: Final = 16 * 1024
_KEY: Final = ("tenant", "run", "kind", "adapter")
AdapterRow = Row[*tuple[object, ...]]


def adapter_not_found(name: AdapterName) -> Exception:
    """Returns the error for an adapter that does not exist or is somebody else's: one answer for both."""
    return make_error("ADAPTER_NOT_FOUND", f"there is no saved adapter {name}; the lists of revisions show yours")


def record_adapter(
    connection: Connection,
    name: AdapterName,
    adapter: adapters_pb2.Adapter,
    seq: int,
    now_us: int,
    *,
    overwrite: bool = False,
) -> adapters_pb2.Adapter:
    """Adds a saved adapter and returns it as recorded; the caller has checked the lease and the blobs.

    Harmless when repeated: the same content, or the same operation's save, returns what is there.
    Raises ADAPTER_EXISTS when the name is taken by other content that may not be overwritten or that a run still
    starts from, QUOTA_EXCEEDED when the tenant stores too much, BAD_VALUE for too much metadata.
    """
    check_metadata(adapter.metadata)
    limit = quotas.storage_limit(connection, name.tenant)
    row = connection.execute(select(*adapters.c).where(is_adapter_row(name))).one_or_none()
    if row is not None and row.deleted_us is None:
        there = _to_adapter(row, _fetch_files(connection, name))
        if (seq and row.seq == seq) or _content(there) == _content(adapter):
            # Saved again, it is as new; under a name that somebody chose it stays for good.
            unnamed = row.unnamed and adapter.unnamed
            connection.execute(update(adapters).where(is_adapter_row(name)).values(unnamed=unnamed, used_us=now_us))
            there.unnamed = unnamed
            return there
        if not overwrite:
            raise make_error(
                "ADAPTER_EXISTS", f"{name} is taken by other content; saved adapters never change, use a new id"
            )
    if row is not None:
        if connection.execute(select(is_needed(name))).scalar_one():
            raise make_error("ADAPTER_EXISTS", f"a run still starts from {name} as it was; use a new id")
        connection.execute(delete(adapters).where(is_adapter_row(name)))
    values = dict(zip(_KEY, (name.tenant, name.run, name.kind, name.adapter), strict=True))
    connection.execute(
        insert(adapters).values(
            **values,
            base=adapter.base,
            lora=adapter.lora.SerializeToString(),
            step=adapter.step,
            seq=seq,
            created_us=now_us,
            unnamed=adapter.unnamed,
            expires_us=_micros(adapter.expires) if adapter.HasField("expires") else None,
            metadata=json.dumps(dict(adapter.metadata), sort_keys=True),
        )
    )
    files = [{**values, "path": f.path, "size": f.size, "sha256": f.sha256} for f in adapter.files]
    connection.execute(insert(adapter_files), files)
    quotas.check_storage(connection, name.tenant, limit)
    return fetch_adapter(connection, name)


def fetch_adapter(
    connection: Connection, name: AdapterName, *, for_worker: bool = False, reader: str | None = None
) -> adapters_pb2.Adapter:
    """Returns a saved adapter, or raises ADAPTER_NOT_FOUND.

    With `reader`, a tenant, it must be that tenant's or public; the answer for all others is that for none.
    A worker also gets a deleted one as long as a run that started from it may have to be rebuilt from it.
    """
    row = connection.execute(select(*adapters.c).where(is_adapter_row(name))).one_or_none()
    hidden = row is not None and row.deleted_us is not None
    if hidden and for_worker:
        hidden = not connection.execute(select(is_needed(name))).scalar_one()
    if row is None or hidden or not (reader in (None, name.tenant) or row.public):
        raise adapter_not_found(name)
    return _to_adapter(row, _fetch_files(connection, name))


def scan_adapters(
    connection: Connection, tenant: str, kind: AdapterKind, run: RunName | None, page: PageRequest
) -> tuple[list[adapters_pb2.Adapter], str]:
    """Returns a page of the tenant's adapters, of one run or all, newest first, and the token of the next page."""
    query = select(*adapters.c).where(
        adapters.c.tenant == tenant, adapters.c.kind == kind, adapters.c.deleted_us.is_(None)
    )
    if run is not None:
        query = query.where(adapters.c.tenant == run.tenant, adapters.c.run == run.run)
    if page.token:
        created_us, (after_run, after_adapter) = decode_token(page.token, 2)
        same_time = and_(
            adapters.c.created_us == created_us,
            or_(
                adapters.c.run < after_run,
                and_(adapters.c.run == after_run, adapters.c.adapter < after_adapter),
            ),
        )
        query = query.where(or_(adapters.c.created_us < created_us, same_time))
    order = (adapters.c.created_us.desc(), adapters.c.run.desc(), adapters.c.adapter.desc())
    rows = connection.execute(query.order_by(*order).limit(page.limit + 1)).all()
    shown = rows[: page.limit]
    last = shown[-1] if len(rows) > page.limit else None
    token = encode_token(last.created_us, [last.run, last.adapter]) if last is not None else ""
    return [_to_adapter(row, _fetch_files(connection, _name_of(row))) for row in shown], token


def delete_adapter(connection: Connection, name: AdapterName, now_us: int) -> str:
    """Hides a saved adapter; its rows and blobs go when nobody needs them. Returns its base.

    Raises ADAPTER_NOT_FOUND.
    """
    live = and_(is_adapter_row(name), adapters.c.deleted_us.is_(None))
    base = connection.execute(select(adapters.c.base).where(live)).scalar_one_or_none()
    if base is None:
        raise adapter_not_found(name)
    connection.execute(update(adapters).where(live).values(deleted_us=now_us))
    return str(base)


def expire_adapter(connection: Connection, name: AdapterName, expires_us: int | None) -> adapters_pb2.Adapter:
    """Sets when a saved adapter goes by itself, None for never; returns it. Raises ADAPTER_NOT_FOUND."""
    return _change(connection, name, {"expires_us": expires_us})


def find_adapter(connection: Connection, own: AdapterName) -> adapters_pb2.Adapter:
    """Returns the tenant's own adapter of this name, else the only public one of any tenant; ADAPTER_NOT_FOUND."""
    there = and_(
        adapters.c.run == own.run,
        adapters.c.kind == own.kind,
        adapters.c.adapter == own.adapter,
        adapters.c.deleted_us.is_(None),
    )
    readable = or_(adapters.c.tenant == own.tenant, adapters.c.public)
    # One's own comes first; of others, a second one is enough to know that it is not the only one.
    query = select(adapters.c.tenant).where(there, readable).order_by(adapters.c.tenant != own.tenant).limit(2)
    owners = connection.execute(query).scalars().all()
    if not owners or (owners[0] != own.tenant and len(owners) > 1):
        raise adapter_not_found(own)
    return fetch_adapter(connection, AdapterName(owners[0], own.run, own.kind, own.adapter))


def set_public(connection: Connection, name: AdapterName, *, public: bool) -> adapters_pb2.Adapter:
    """Sets whether every tenant may read an adapter; a public one does not pass for want of a name.

    Returns it. Raises ADAPTER_NOT_FOUND.
    """
    return _change(connection, name, {"public": True, "unnamed": False} if public else {"public": False})


def copy_adapter(
    connection: Connection, source: AdapterName, target: AdapterName, expires_us: int | None, now_us: int
) -> adapters_pb2.Adapter:
    """Records an adapter that the target's tenant may read once more under a run of that tenant; returns the copy.

    Raises ADAPTER_NOT_FOUND, RUN_NOT_FOUND, ADAPTER_EXISTS, QUOTA_EXCEEDED, and INCOMPATIBLE_ADAPTER when the run has
    another base or shape.
    """
    adapter = fetch_adapter(connection, source, reader=target.tenant)
    run = connection.execute(
        select(runs.c.base, runs.c.lora).where(runs.c.tenant == target.tenant, runs.c.run == target.run)
    ).one_or_none()
    if run is None:
        raise make_error("RUN_NOT_FOUND", f"there is no run {target.run_name}; ListRuns shows yours")
    shape = types_pb2.LoraConfig.FromString(run.lora)
    shape.seed = adapter.lora.seed
    if run.base != adapter.base or shape != adapter.lora:
        raise make_error("INCOMPATIBLE_ADAPTER", f"{source} has another base or shape than {target.run_name}")
    copy = adapters_pb2.Adapter()
    copy.CopyFrom(adapter)
    copy.unnamed = copy.public = False
    copy.ClearField("expires")
    if expires_us is not None:
        copy.expires.CopyFrom(to_timestamp(expires_us))
    return record_adapter(connection, target, copy, 0, now_us)


def expire_adapters(connection: Connection, now_us: int) -> list[tuple[str, str]]:
    """Hides the adapters whose time has come; returns their names and bases."""
    due = and_(adapters.c.expires_us <= now_us, adapters.c.deleted_us.is_(None))
    rows = connection.execute(select(*adapters.c).where(due)).all()
    for row in rows:
        delete_adapter(connection, _name_of(row), now_us)
    return [(str(_name_of(row)), row.base) for row in rows]


def check_metadata(metadata: Mapping[str, str]) -> None:
    """Raises BAD_VALUE when there is more than is kept."""
    num_bytes = sum(len(key.encode()) + len(value.encode()) for key, value in metadata.items())
    if len(metadata) > MAX_METADATA_ENTRIES or num_bytes > MAX_METADATA_BYTES:
        raise make_error(
            "BAD_VALUE",
            f"metadata has {len(metadata)} entries and {num_bytes} bytes; "
            f"at most {MAX_METADATA_ENTRIES} entries and {MAX_METADATA_BYTES} bytes are kept",
        )


def purge_adapters(connection: Connection, before_us: int) -> int:
    """Removes the rows of adapters that were deleted before then and that no run needs; returns how many."""
    rows = connection.execute(select(*adapters.c).where(adapters.c.deleted_us < before_us)).all()
    names = [_name_of(row) for row in rows]
    free = [name for name in names if not connection.execute(select(is_needed(name))).scalar_one()]
    for name in free:
        connection.execute(delete(adapters).where(is_adapter_row(name)))
    return len(free)


def is_adapter_row(name: AdapterName) -> ColumnElement[bool]:
    """Returns the condition that a row of `adapters` is this adapter's."""
    return and_(
        adapters.c.tenant == name.tenant,
        adapters.c.run == name.run,
        adapters.c.kind == name.kind,
        adapters.c.adapter == name.adapter,
    )


def is_needed(name: AdapterName) -> ColumnElement[bool]:
    """Tells whether a run that started from the adapter has no snapshot yet: its state begins at the adapter."""
    has_snapshot = exists().where(snapshots.c.tenant == runs.c.tenant, snapshots.c.run == runs.c.run)
    return exists().where(runs.c.from_adapter == str(name), ~has_snapshot)


def _change(connection: Connection, name: AdapterName, values: Mapping[str, object]) -> adapters_pb2.Adapter:
    """Sets columns of an adapter that is not deleted; returns it. Raises ADAPTER_NOT_FOUND."""
    live = and_(is_adapter_row(name), adapters.c.deleted_us.is_(None))
    connection.execute(update(adapters).where(live).values(values))
    return fetch_adapter(connection, name)


def _fetch_files(connection: Connection, name: AdapterName) -> list[adapters_pb2.AdapterFile]:
    query = (
        select(adapter_files.c.path, adapter_files.c.size, adapter_files.c.sha256)
        .where(
            adapter_files.c.tenant == name.tenant,
            adapter_files.c.run == name.run,
            adapter_files.c.kind == name.kind,
            adapter_files.c.adapter == name.adapter,
        )
        .order_by(adapter_files.c.path)
    )
    rows = connection.execute(query)
    return [adapters_pb2.AdapterFile(path=row.path, size=row.size, sha256=row.sha256) for row in rows]


def _name_of(row: AdapterRow) -> AdapterName:
    return AdapterName(row.tenant, row.run, "revisions" if row.kind == "revisions" else "checkpoints", row.adapter)


def _to_adapter(row: AdapterRow, files: Iterable[adapters_pb2.AdapterFile]) -> adapters_pb2.Adapter:
    return adapters_pb2.Adapter(
        name=str(_name_of(row)),
        base=row.base,
        lora=types_pb2.LoraConfig.FromString(row.lora),
        step=row.step,
        created=to_timestamp(row.created_us),
        files=files,
        unnamed=row.unnamed,
        expires=None if row.expires_us is None else to_timestamp(row.expires_us),
        metadata=json.loads(row.metadata),
        public=row.public,
    )


def _micros(stamp: Timestamp) -> int:
    return stamp.ToNanoseconds() // 1000


def _content(adapter: adapters_pb2.Adapter) -> tuple[object, ...]:
    """Returns what must agree for two saves to be the same: base and files; the shape follows from the files."""
    return adapter.base, sorted((f.path, f.size, f.sha256) for f in adapter.files)
