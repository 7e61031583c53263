"""Completions that a tenant keeps: recording, looking up, listing, deleting.

Bodies for Database.read and Database.write. A tenant's bytes are counted in its own row, in the transaction that
changes them. Knows nothing of what the JSON says.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

from sqlalchemy import ColumnElement, Connection, Row, and_, delete, exists, insert, select, update

from treadle.errors import TreadleError, make_error
from treadle.v1 import datasets_pb2
from treadle_store import quotas
from treadle_store.clock import to_timestamp
from treadle_store.tables import completion_tags, completions, tenants

# What a row takes besides its contents.
ROW_BYTES: Final = 256
# Contents of one page; a message has 4 MiB.
PAGE_BYTES: Final = 3 * 2**20
DELETED_AT_ONCE: Final = 500
_ROOM_SECONDS: Final = 60.0
AnyRow = Row[*tuple[object, ...]]


@dataclass(frozen=True, slots=True)
class Filter:
    """Which completions of a tenant; an empty model is any."""

    tenant: str
    model: str
    metadata: Mapping[str, str]

    @property
    def condition(self) -> ColumnElement[bool]:
        """The filter as SQL."""
        wanted: list[ColumnElement[bool]] = [completions.c.tenant == self.tenant]
        if self.model:
            wanted.append(completions.c.model == self.model)
        wanted += [
            exists().where(
                completion_tags.c.tenant == completions.c.tenant,
                completion_tags.c.completion == completions.c.completion,
                completion_tags.c.key == key,
                completion_tags.c.value == value,
            )
            for key, value in self.metadata.items()
        ]
        return and_(*wanted)


@dataclass(frozen=True, slots=True)
class Page:
    """Which part of a listing."""

    after: str
    limit: int
    descending: bool = False
    brief: bool = False


def not_found(name: str) -> TreadleError:
    """Returns the error for a completion that does not exist or is somebody else's: one answer for both."""
    return make_error("COMPLETION_NOT_FOUND", f"there is no completion {name[:80]!r} of yours; the list shows them")


def check_room(connection: Connection, tenant: str, most_bytes: int, size: int = 0, *, lock: bool = False) -> None:
    """Raises PERMISSION_DENIED without the tenant's consent, QUOTA_EXCEEDED when it would keep more than it may."""
    query = select(*tenants.c).where(tenants.c.tenant == tenant)
    row = connection.execute(query.with_for_update() if lock else query).one_or_none()
    if row is None or not row.store_completions:
        raise make_error(
            "PERMISSION_DENIED",
            "this tenant has not agreed that completions are kept: leave `store` out, or have an administrator run"
            f" `treadle tenant consent {tenant} --store-completions`",
        )
    if row.completion_bytes + size > most_bytes:
        raise make_error(
            "QUOTA_EXCEEDED",
            f"{row.completion_bytes} bytes of completions are kept, of at most {most_bytes}: export and delete some",
            _ROOM_SECONDS,
        )
    quotas.check_storage(connection, tenant, quotas.storage_limit(connection, tenant, lock=lock))


def record(
    connection: Connection, tenant: str, wanted: datasets_pb2.StoredCompletion, most_bytes: int, now_us: int
) -> datasets_pb2.StoredCompletion:
    """Keeps a completion and returns it without its contents. Harmless when repeated; see check_room for errors.

    Raises REQUEST_ID_REUSED when the id is taken by another completion.
    """
    messages, response = wanted.messages_json.encode(), wanted.response_json.encode()
    size = ROW_BYTES + len(messages) + len(response) + sum(map(len, [*wanted.metadata, *wanted.metadata.values()]))
    row = connection.execute(select(*completions.c).where(_is(tenant, wanted.id))).one_or_none()
    if row is not None:
        if (row.model, row.messages, row.response) != (wanted.model, messages, response):
            raise make_error("REQUEST_ID_REUSED", f"the id {wanted.id} is taken by another completion")
        return _to_message(row, _tags(connection, tenant, [wanted.id])[wanted.id], brief=True)
    check_room(connection, tenant, most_bytes, size, lock=True)
    connection.execute(
        insert(completions).values(
            tenant=tenant,
            completion=wanted.id,
            model=wanted.model,
            created_us=now_us,
            size=size,
            messages=messages,
            response=response,
        )
    )
    _put_tags(connection, tenant, wanted.id, wanted.metadata)
    _count(connection, tenant, size)
    quotas.check_storage(connection, tenant, quotas.storage_limit(connection, tenant))
    return fetch(connection, tenant, wanted.id, brief=True)


def fetch(connection: Connection, tenant: str, name: str, *, brief: bool = False) -> datasets_pb2.StoredCompletion:
    """Returns a completion, or raises COMPLETION_NOT_FOUND."""
    row = connection.execute(select(*completions.c).where(_is(tenant, name))).one_or_none()
    if row is None:
        raise not_found(name)
    return _to_message(row, _tags(connection, tenant, [name])[name], brief=brief)


def scan(connection: Connection, wanted: Filter, page: Page) -> tuple[list[datasets_pb2.StoredCompletion], bool]:
    """Returns a page, and whether there are more behind it; long completions make a page shorter."""
    name = completions.c.completion
    query = select(name, completions.c.size).where(wanted.condition)
    if page.after:
        query = query.where(name < page.after if page.descending else name > page.after)
    found = connection.execute(query.order_by(name.desc() if page.descending else name).limit(page.limit + 1)).all()
    shown: list[str] = []
    left = PAGE_BYTES
    for row in found[: page.limit]:
        left -= 0 if page.brief else row.size
        if shown and left < 0:
            break
        shown.append(row.completion)
    rows = connection.execute(select(*completions.c).where(completions.c.tenant == wanted.tenant, name.in_(shown)))
    tags = _tags(connection, wanted.tenant, shown)
    by_name = {row.completion: _to_message(row, tags[row.completion], brief=page.brief) for row in rows}
    return [by_name[name] for name in shown], len(shown) < len(found)


def change_metadata(
    connection: Connection, tenant: str, name: str, metadata: Mapping[str, str]
) -> datasets_pb2.StoredCompletion:
    """Replaces a completion's metadata and returns it whole. Raises COMPLETION_NOT_FOUND, QUOTA_EXCEEDED."""
    locked = select(completions.c.size).where(_is(tenant, name)).with_for_update()
    if connection.execute(locked).one_or_none() is None:
        raise not_found(name)
    grown = _length(metadata) - _length(_tags(connection, tenant, [name])[name])
    connection.execute(delete(completion_tags).where(_is_tag(tenant, name)))
    _put_tags(connection, tenant, name, metadata)
    connection.execute(update(completions).where(_is(tenant, name)).values(size=completions.c.size + grown))
    _count(connection, tenant, grown)
    if grown > 0:
        quotas.check_storage(connection, tenant, quotas.storage_limit(connection, tenant))
    return fetch(connection, tenant, name)


def remove(connection: Connection, tenant: str, name: str) -> None:
    """Deletes a completion. Raises COMPLETION_NOT_FOUND."""
    size = connection.execute(select(completions.c.size).where(_is(tenant, name))).scalar_one_or_none()
    if size is None or not connection.execute(delete(completions).where(_is(tenant, name))).rowcount:
        raise not_found(name)
    _count(connection, tenant, -size)


def remove_some(connection: Connection, wanted: Filter) -> int:
    """Deletes some hundred completions that a filter names; returns how many, 0 when there are no more."""
    query = select(completions.c.completion, completions.c.size).where(wanted.condition).limit(DELETED_AT_ONCE)
    rows = connection.execute(query.with_for_update()).all()
    names = [row.completion for row in rows]
    connection.execute(
        delete(completions).where(completions.c.tenant == wanted.tenant, completions.c.completion.in_(names))
    )
    _count(connection, wanted.tenant, -sum(row.size for row in rows))
    return len(rows)


def _count(connection: Connection, tenant: str, size: int) -> None:
    change = update(tenants).where(tenants.c.tenant == tenant)
    connection.execute(change.values(completion_bytes=tenants.c.completion_bytes + size))


def _put_tags(connection: Connection, tenant: str, name: str, metadata: Mapping[str, str]) -> None:
    if metadata:
        rows = [{"tenant": tenant, "completion": name, "key": key, "value": metadata[key]} for key in sorted(metadata)]
        connection.execute(insert(completion_tags), rows)


def _tags(connection: Connection, tenant: str, names: Collection[str]) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {name: {} for name in names}
    query = select(*completion_tags.c).where(
        completion_tags.c.tenant == tenant, completion_tags.c.completion.in_(names)
    )
    for row in connection.execute(query):
        found[row.completion][row.key] = row.value
    return found


def _length(metadata: Mapping[str, str]) -> int:
    return sum(len(key) + len(value) for key, value in metadata.items())


def _is(tenant: str, name: str) -> ColumnElement[bool]:
    return and_(completions.c.tenant == tenant, completions.c.completion == name)


def _is_tag(tenant: str, name: str) -> ColumnElement[bool]:
    return and_(completion_tags.c.tenant == tenant, completion_tags.c.completion == name)


def _to_message(row: AnyRow, metadata: Mapping[str, str], *, brief: bool) -> datasets_pb2.StoredCompletion:
    return datasets_pb2.StoredCompletion(
        id=row.completion,
        model=row.model,
        created=to_timestamp(row.created_us),
        metadata=metadata,
        messages_json="" if brief else row.messages.decode(),
        response_json="" if brief else row.response.decode(),
        size=row.size,
    )
