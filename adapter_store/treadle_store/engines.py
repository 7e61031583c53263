"""SQLite and PostgreSQL, and all that differs between them: opening connections, transactions, which errors pass.

A writer's transaction is durable once committed and sees what others committed before each of its statements or
before its first one; a reader's has one consistent view and cannot write. Knows no table.
"""

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, InternalError, OperationalError
from sqlalchemy.pool import ConnectionPoolEntry

SQLITE: Final = "sqlite"
POSTGRESQL: Final = "postgresql"
NUM_READERS: Final = {SQLITE: 2, POSTGRESQL: 4}
_PRAGMAS: Final = (
    "PRAGMA journal_mode=WAL",
    # FULL syncs the log at every commit: an acknowledged write survives the loss of power.
    "PRAGMA synchronous=FULL",
    "PRAGMA foreign_keys=ON",
    "PRAGMA busy_timeout=10000",
    "PRAGMA journal_size_limit=67108864",
)
# Seconds and milliseconds after which a server that is silent counts as lost. A peer that vanished without a word is
# found by keepalives while an answer is awaited, by the user timeout while bytes are under way.
_POSTGRES_CONNECT: Final = {
    "connect_timeout": 5,
    "keepalives": 1,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
    "application_name": "treadle-store",
}
_POSTGRES_SESSION: Final = (
    # Weaker than `local` an acknowledged write could be lost with the server; what is stronger stays.
    "SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'",
    "SET lock_timeout = '10s'",
    "SET statement_timeout = '60s'",
    "SET idle_in_transaction_session_timeout = '60s'",
    # Names compare and sort the same on every server.
    "SET client_encoding = 'UTF8'",
)
# Deadlock and serialization failure: the transaction was rolled back because of others, and may simply run again.
_RERUN_STATES: Final = frozenset({"40001", "40P01"})
# Longer than any statement may take on the server: beyond it the server, or the way to it, is gone.
_PATIENCE_SECONDS: Final = 75.0
_MIGRATION_LOCK: Final = 0x7472_6561_646C_6500


class SchemaError(Exception):
    """The database's schema is not one that this version can use."""


@dataclass(frozen=True, slots=True)
class Engines:
    """Two pools of connections to one database."""

    kind: str
    writer: Engine
    reader: Engine

    def dispose(self) -> None:
        """Closes all connections."""
        self.reader.dispose()
        self.writer.dispose()


def check_url(url: str) -> URL:
    """Returns the parsed URL with its driver, or raises ValueError with what to write instead."""
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise ValueError(f"{url!r} is not a database URL: {error}") from error
    kind = parsed.get_backend_name()
    if kind == POSTGRESQL and parsed.database:
        return parsed.set(drivername="postgresql+psycopg")
    if kind == SQLITE and parsed.database and parsed.database != ":memory:":
        return parsed
    raise ValueError(
        f"{parsed.render_as_string()!r} must name a SQLite file (sqlite:////var/lib/treadle/store.db) "
        "or a PostgreSQL database (postgresql://user@host/treadle)"
    )


def sqlite_file(url: str) -> Path | None:
    """Returns the file of a SQLite database, None for another kind."""
    parsed = check_url(url)
    return Path(parsed.database or "").absolute() if parsed.get_backend_name() == SQLITE else None


def open_engines(url: str) -> Engines:
    """Returns pools that connect when first used. Raises ValueError for a URL that is of no use."""
    parsed = check_url(url)
    if parsed.get_backend_name() == SQLITE:
        return Engines(SQLITE, _sqlite_engine(parsed, "BEGIN IMMEDIATE", 1), _sqlite_engine(parsed, "BEGIN", 2))
    # READ COMMITTED: a statement that waited for a row's lock goes on with that row as it is now, which is what makes
    # checking a lease under its lock enough. A reader gets its one view from REPEATABLE READ.
    writer = _postgres_engine(parsed, "READ COMMITTED", 1, read_only=False)
    return Engines(
        POSTGRESQL, writer, _postgres_engine(parsed, "REPEATABLE READ", NUM_READERS[POSTGRESQL], read_only=True)
    )


def migrate(engine: Engine) -> None:
    """Brings the schema to its newest version, all or nothing. Raises SchemaError for a schema of a later release."""
    config = _alembic()
    with engine.begin() as connection:
        if engine.dialect.name == POSTGRESQL:
            # Replicas that start together take turns; SQLite's transaction holds the others off by itself.
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_MIGRATION_LOCK})")
        config.attributes["connection"] = connection
        try:
            command.upgrade(config, "head")
        except CommandError as error:
            raise SchemaError(f"the database belongs to another release of treadle: {error}") from error


def schema_versions(engine: Engine) -> tuple[str | None, str | None]:
    """Returns the schema's version in the database, None without one, and the version that this release uses."""
    with engine.connect() as connection:
        found = MigrationContext.configure(connection).get_current_revision()
    return found, ScriptDirectory.from_config(_alembic()).get_current_head()


def is_trouble(error: DBAPIError) -> bool:
    """Tells whether the database is in trouble, not the statement: away, full, read-only, too slow."""
    return isinstance(error, OperationalError | InterfaceError | InternalError)


def may_rerun(error: DBAPIError, *, committing: bool) -> bool:
    """Tells whether a transaction that failed so has had no effect for certain and may succeed at once.

    A connection that was lost in the commit itself leaves it open whether it took place.
    """
    if getattr(error.orig, "sqlstate", None) in _RERUN_STATES:
        return True
    return error.connection_invalidated and not committing


@contextlib.contextmanager
def patience(connection: Connection) -> Iterator[None]:
    """Cuts a PostgreSQL connection off when the server has been silent for too long, so that nothing waits for ever."""
    if connection.dialect.name != POSTGRESQL:
        yield
        return
    driver: Any = connection.connection.driver_connection  # the driver's own type is not SQLAlchemy's business
    timer = threading.Timer(_PATIENCE_SECONDS, _cut_off, [driver])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _cut_off(driver: Any) -> None:  # see patience
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(driver.pgconn.socket)) as stream:
        stream.shutdown(socket.SHUT_RDWR)


def _sqlite_engine(url: URL, begin: str, num_connections: int) -> Engine:
    connect = {"check_same_thread": False, "timeout": 10}
    engine = create_engine(url, pool_size=num_connections, max_overflow=0, connect_args=connect)

    # The driver's own idea of when to begin a transaction would leave SAVEPOINT and DDL outside of one.
    @event.listens_for(engine, "connect")
    def _configure(connection: Any, _record: ConnectionPoolEntry) -> None:  # drivers' connections share no type
        connection.isolation_level = None
        for pragma in _PRAGMAS:
            connection.execute(pragma)

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        connection.exec_driver_sql(begin)

    return engine


def _postgres_engine(url: URL, isolation: str, num_connections: int, *, read_only: bool) -> Engine:
    given = {name: value for name, value in _POSTGRES_CONNECT.items() if name not in url.query}
    engine = create_engine(
        url,
        pool_size=num_connections,
        max_overflow=0,
        pool_timeout=10,
        isolation_level=isolation,
        connect_args=given,
    )

    @event.listens_for(engine, "connect")
    def _configure(connection: Any, _record: ConnectionPoolEntry) -> None:  # drivers' connections share no type
        connection.autocommit, autocommit = True, connection.autocommit
        for statement in _POSTGRES_SESSION:
            connection.execute(statement)
        connection.autocommit = autocommit
        connection.read_only = read_only

    return engine


def _alembic() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    return config
