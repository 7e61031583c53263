"""Tenants and API keys. A key's secret is shown once; only its sha256 is kept.

A secret reads `treadle_<tenant>_<key id>_<32 random base62 characters>`: 190 random bits need no slow hash.
Bodies for Database.read and Database.write. Knows nothing of what a scope allows.
"""

import hashlib
import hmac
import secrets
import string
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from sqlalchemy import Connection, Row, and_, func, insert, not_, select, update

from treadle.errors import make_error
from treadle.names import check_tenant
from treadle.v1 import admin_pb2
from treadle_service.principal import SCOPES, Principal
from treadle_store.clock import to_timestamp
from treadle_store.tables import keys, tenants

DEFAULT_SCOPES: Final = ("sample", "train")
_PREFIX: Final = "treadle"
_ID_ALPHABET: Final = string.ascii_lowercase + string.digits
_SECRET_ALPHABET: Final = string.ascii_letters + string.digits


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key that is about to be issued."""

    tenant: str
    scopes: tuple[str, ...]
    key_id: str
    secret: str
    expires_us: int | None


def make_key(tenant: str, scopes: Collection[str], expires_us: int | None, now_us: int) -> NewKey:
    """Draws a key. Raises BAD_NAME, BAD_SCOPE, or BAD_VALUE when it would have ended already."""
    check_tenant(tenant)
    unknown = sorted(set(scopes) - SCOPES)
    if unknown:
        raise make_error("BAD_SCOPE", f"{unknown[0][:40]!r} is not a scope; choose from {', '.join(sorted(SCOPES))}")
    if expires_us is not None and expires_us <= now_us:
        raise make_error("BAD_VALUE", "expires lies in the past; give a later time or leave it unset")
    key_id = "".join(secrets.choice(_ID_ALPHABET) for _ in range(8))
    random = "".join(secrets.choice(_SECRET_ALPHABET) for _ in range(32))
    secret = f"{_PREFIX}_{tenant}_{key_id}_{random}"
    return NewKey(tenant, tuple(sorted(set(scopes or DEFAULT_SCOPES))), key_id, secret, expires_us)


def create_tenant(connection: Connection, tenant: str, now_us: int) -> admin_pb2.Tenant:
    """Adds a tenant. Raises BAD_NAME or TENANT_EXISTS."""
    check_tenant(tenant)
    if _tenant_exists(connection, tenant):
        raise make_error("TENANT_EXISTS", f"there is a tenant {tenant!r} already")
    connection.execute(insert(tenants).values(tenant=tenant, created_us=now_us))
    return admin_pb2.Tenant(tenant=tenant, created=to_timestamp(now_us))


def update_tenant(connection: Connection, tenant: str, *, store_completions: bool | None) -> admin_pb2.Tenant:
    """Changes the settings that are given. Raises TENANT_NOT_FOUND."""
    if store_completions is not None:
        change = update(tenants).where(tenants.c.tenant == tenant)
        connection.execute(change.values(store_completions=store_completions))
    row = connection.execute(select(*tenants.c).where(tenants.c.tenant == tenant)).one_or_none()
    if row is None:
        raise make_error("TENANT_NOT_FOUND", f"there is no tenant {tenant[:40]!r}")
    return _to_tenant(row)


def list_tenants(connection: Connection) -> list[admin_pb2.Tenant]:
    """Returns all tenants by name."""
    rows = connection.execute(select(*tenants.c).order_by(tenants.c.tenant))
    return [_to_tenant(row) for row in rows]


def add_key(connection: Connection, key: NewKey, now_us: int) -> admin_pb2.Key:
    """Stores a key. Raises TENANT_NOT_FOUND."""
    if not _tenant_exists(connection, key.tenant):
        raise make_error("TENANT_NOT_FOUND", f"there is no tenant {key.tenant!r}; create it first")
    connection.execute(
        insert(keys).values(
            tenant=key.tenant,
            key_id=key.key_id,
            secret_sha256=hashlib.sha256(key.secret.encode()).hexdigest(),
            scopes=",".join(key.scopes),
            created_us=now_us,
            expires_us=key.expires_us,
            revoked=False,
        )
    )
    return _to_key(connection.execute(select(*keys.c).where(keys.c.key_id == key.key_id)).one())


def list_keys(connection: Connection, tenant: str) -> list[admin_pb2.Key]:
    """Returns the keys of a tenant, of all tenants when it is empty, oldest first."""
    query = select(*keys.c).order_by(keys.c.tenant, keys.c.created_us, keys.c.key_id)
    rows = connection.execute(query.where(keys.c.tenant == tenant) if tenant else query)
    return [_to_key(row) for row in rows]


def revoke_key(connection: Connection, key_id: str) -> None:
    """Ends a key for good; doing it twice is no error. Raises KEY_NOT_FOUND."""
    if connection.execute(update(keys).where(keys.c.key_id == key_id).values(revoked=True)).rowcount == 0:
        raise make_error("KEY_NOT_FOUND", f"there is no key {key_id[:40]!r}; ListKeys shows them")


def authenticate(connection: Connection, secret: str, now_us: int) -> Principal:
    """Returns whose key it is. Raises UNAUTHENTICATED: unknown, revoked and expired are one answer."""
    refusal = make_error("UNAUTHENTICATED", "the API key is not valid; ask your administrator for one")
    parts = secret.split("_")
    if len(parts) != 4 or parts[0] != _PREFIX:
        raise refusal
    query = select(*keys.c).where(keys.c.tenant == parts[1], keys.c.key_id == parts[2])
    row = connection.execute(query).one_or_none()
    digest = hashlib.sha256(secret.encode()).hexdigest()
    if row is None or not hmac.compare_digest(digest, row.secret_sha256):
        raise refusal
    if row.revoked or (row.expires_us is not None and row.expires_us <= now_us):
        raise refusal
    return Principal(row.tenant, frozenset(row.scopes.split(",")), row.key_id)


def ended_keys(connection: Connection, key_ids: Collection[str], now_us: int) -> list[str]:
    """Returns those of the keys that are revoked, expired or gone, in the order asked."""
    expired = and_(keys.c.expires_us.is_not(None), keys.c.expires_us <= now_us)
    valid = select(keys.c.key_id).where(keys.c.key_id.in_(key_ids), keys.c.revoked.is_(False), not_(expired))
    good = set(connection.execute(valid).scalars())
    return [key_id for key_id in key_ids if key_id not in good]


def has_keys(connection: Connection) -> bool:
    """Tells whether any key was ever issued."""
    return connection.execute(select(func.count()).select_from(keys)).scalar_one() > 0


def _tenant_exists(connection: Connection, tenant: str) -> bool:
    return connection.execute(select(tenants.c.tenant).where(tenants.c.tenant == tenant)).first() is not None


def _to_tenant(row: Row[*tuple[object, ...]]) -> admin_pb2.Tenant:
    return admin_pb2.Tenant(
        tenant=row.tenant, created=to_timestamp(row.created_us), store_completions=row.store_completions
    )


def _to_key(row: Row[*tuple[object, ...]]) -> admin_pb2.Key:
    key = admin_pb2.Key(
        key_id=row.key_id,
        tenant=row.tenant,
        scopes=row.scopes.split(","),
        created=to_timestamp(row.created_us),
        revoked=row.revoked,
    )
    if row.expires_us is not None:
        key.expires.CopyFrom(to_timestamp(row.expires_us))
    return key
