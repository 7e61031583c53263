"""The database behind an async face: one writer thread with group commit, a small pool of readers.

A body is a function of a Connection that runs inside a transaction. The writer drains what waits, runs each body in
a SAVEPOINT of its own inside one transaction and commits once, so that many writes share one fsync and each fails
alone. A write is answered after the commit. Knows nothing of what the bodies say.
"""

import asyncio
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar, cast

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import OperationalError, SQLAlchemyError

from treadle.errors import TreadleError, make_error
from treadle_service.logs import get_logger

T = TypeVar("T")
Body = Callable[[Connection], T]

MAX_GROUPS_PER_COMMIT: Final = 256
NUM_READERS: Final = 2
_PRAGMAS: Final = (
    "PRAGMA journal_mode=WAL",
    # FULL syncs the log at every commit: an acknowledged write survives the loss of power.
    "PRAGMA synchronous=FULL",
    "PRAGMA foreign_keys=ON",
    "PRAGMA busy_timeout=10000",
    "PRAGMA journal_size_limit=67108864",
)
log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Failure:
    error: Exception


@dataclass(frozen=True, slots=True)
class _Group:
    """Bodies that share a transaction, and where their outcomes go."""

    bodies: Sequence[Body[Any]]  # each body has its own type of value
    outcomes: Future[list[Any]] = field(default_factory=Future)


class Database:
    """An open database, migrated to the newest schema."""

    def __init__(self, url: str) -> None:
        if make_url(url).get_backend_name() != "sqlite" or not make_url(url).database:
            raise ValueError(f"database_url {url!r} must name a SQLite file: sqlite:////path/to/store.db")
        self._writer = _open_engine(url, "BEGIN IMMEDIATE", 1)
        self._reader = _open_engine(url, "BEGIN", NUM_READERS)
        _migrate(self._writer)
        self._waiting: queue.SimpleQueue[_Group | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write_loop, name="store-writer", daemon=True)
        self._thread.start()
        self._readers = ThreadPoolExecutor(NUM_READERS, "store-reader")

    async def read(self, body: Body[T]) -> T:
        """Returns the body's value, taken from one consistent view of the database."""
        return await asyncio.get_running_loop().run_in_executor(self._readers, self._read, body)

    async def write(self, body: Body[T]) -> T:
        """Returns the body's value once its writes are durable; raises what the body raised, having written nothing."""
        (outcome,) = await self._write_group([body])
        if isinstance(outcome, _Failure):
            raise outcome.error
        return cast(T, outcome)

    async def write_all(self, bodies: Sequence[Body[T]]) -> list[T | TreadleError]:
        """Runs bodies in one transaction; returns each one's value or TreadleError, raises any other error."""
        outcomes = await self._write_group(bodies)
        for outcome in outcomes:
            if isinstance(outcome, _Failure) and not isinstance(outcome.error, TreadleError):
                raise outcome.error
        return [_value_or_error(outcome) for outcome in outcomes]

    def close(self) -> None:
        """Finishes what waits, then closes the database."""
        self._waiting.put(None)
        self._thread.join()
        self._readers.shutdown()
        self._reader.dispose()
        self._writer.dispose()

    async def _write_group(self, bodies: Sequence[Body[Any]]) -> list[Any]:
        group = _Group(bodies)
        self._waiting.put(group)
        return await asyncio.wrap_future(group.outcomes)

    def _read(self, body: Body[T]) -> T:
        try:
            with self._reader.begin() as connection:
                return body(connection)
        except OperationalError as error:
            raise _trouble(error) from error

    def _write_loop(self) -> None:
        open_ = True
        while open_:
            groups = [self._waiting.get()]
            while len(groups) < MAX_GROUPS_PER_COMMIT and not self._waiting.empty():
                groups.append(self._waiting.get())
            open_ = None not in groups
            # A group whose caller has gone before its turn is dropped here; later its outcome has no reader.
            live = [group for group in groups if group and group.outcomes.set_running_or_notify_cancel()]
            if live:
                self._commit(live)

    def _commit(self, groups: list[_Group]) -> None:
        try:
            with self._writer.begin() as connection:
                outcomes = [[_run_alone(connection, body) for body in group.bodies] for group in groups]
        except SQLAlchemyError as error:
            failure = _trouble(error)
            for group in groups:
                group.outcomes.set_exception(failure)
            return
        for group, values in zip(groups, outcomes, strict=True):
            group.outcomes.set_result(values)


def _run_alone(connection: Connection, body: Body[Any]) -> Any:
    """Returns the body's value or its failure; raises OperationalError when the database itself is in trouble."""
    savepoint = connection.begin_nested()
    try:
        value = body(connection)
    except OperationalError:
        raise
    except Exception as error:  # noqa: BLE001  The writer thread's guard: one body's fault is its caller's alone.
        savepoint.rollback()
        return _Failure(error)
    savepoint.commit()
    return value


def _value_or_error(outcome: Any) -> Any:
    return outcome.error if isinstance(outcome, _Failure) else outcome


def _trouble(error: SQLAlchemyError) -> TreadleError:
    log.error("database_trouble", error=type(error).__name__, cause=str(getattr(error, "orig", "")))
    return make_error("UNAVAILABLE", "the store cannot use its database now; try again", 1.0)


def _open_engine(url: str, begin: str, num_connections: int) -> Engine:
    engine = create_engine(
        url, pool_size=num_connections, max_overflow=0, connect_args={"check_same_thread": False, "timeout": 10}
    )

    # The driver's own idea of when to begin a transaction would leave SAVEPOINT and DDL outside of one.
    @event.listens_for(engine, "connect")
    def _configure(connection: Any, _record: object) -> None:  # the driver's connection has no common type
        connection.isolation_level = None
        for pragma in _PRAGMAS:
            connection.execute(pragma)

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        connection.exec_driver_sql(begin)

    return engine


def _migrate(engine: Engine) -> None:
    """Brings the schema to its newest version, all or nothing."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
