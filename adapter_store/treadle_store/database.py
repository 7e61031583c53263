"""The database behind an async face: one writer thread with group commit, a small pool of readers.

A body is a function of a Connection that runs inside a transaction and may run again: nothing of it lasts unless the
transaction commits. The writer drains what waits, runs all bodies in one transaction and commits once, so that many
writes share one fsync. Bodies of a kind may share their statements too (`Batched`). If one fails they run again, each
in a SAVEPOINT, so that it fails alone. A write is answered after the commit. Knows nothing of what the bodies say, and
leaves to `engines` what differs between databases.
"""

import asyncio
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final, Generic, TypeVar, cast

from prometheus_client import Counter, Histogram
from sqlalchemy import Connection
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, SQLAlchemyError

from treadle.errors import TreadleError, make_error
from treadle_service import failpoints
from treadle_service.logs import get_logger
from treadle_service.metrics import COUNTS, SECONDS
from treadle_store.engines import NUM_READERS, is_trouble, may_rerun, migrate, open_engines, patience

_COMMITS: Final = Histogram("treadle_store_commit_seconds", "Transactions, syncs included", buckets=SECONDS)
_SHARED: Final = Histogram("treadle_store_commit_writes", "Writes that share a transaction", buckets=COUNTS)
_TROUBLE: Final = Counter("treadle_store_database_troubles_total", "Transactions that the database could not do")

T = TypeVar("T")
ItemT = TypeVar("ItemT")
Body = Callable[[Connection], T]
# Runs bodies in an open transaction and returns their values or failures, each body's of its own type.
_Run = Callable[[Connection, Sequence[Body[Any]]], list[Any]]

MAX_GROUPS_PER_COMMIT: Final = 256
MAX_WAITING: Final = 4096
MAX_RERUNS: Final = 4
log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Failure:
    error: Exception


@dataclass(frozen=True, slots=True)
class _Group:
    """Bodies that share a transaction, and where their outcomes go."""

    bodies: Sequence[Body[Any]]  # each body has its own type of value
    outcomes: Future[list[Any]] = field(default_factory=Future)


@dataclass(frozen=True, slots=True)
class Batched(Generic[ItemT, T]):
    """A body that shares its statements with the others of its kind in a transaction.

    `batch` gives each item's value, or the error of one of which it has written nothing.
    """

    batch: Callable[[Connection, Sequence[ItemT]], Sequence[T | TreadleError]]
    item: ItemT

    def __call__(self, connection: Connection) -> T:
        """Runs alone."""
        (outcome,) = self.batch(connection, [self.item])
        if isinstance(outcome, TreadleError):
            raise outcome
        return outcome


class _BodyFailedError(Exception):
    """Some body raised: the transaction has to run again with a savepoint for each."""


class Database:
    """An open database, migrated to the newest schema.

    Raises ValueError for a URL that is of no use, SchemaError for a schema of a later release, UNAVAILABLE when the
    database cannot be reached.
    """

    def __init__(self, url: str) -> None:
        self._engines = open_engines(url)
        self.kind = self._engines.kind
        try:
            migrate(self._engines.writer)
        except DBAPIError as error:
            self._engines.dispose()
            raise _trouble(error) from error
        self._committing = False
        self._waiting: queue.SimpleQueue[_Group | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write_loop, name="store-writer", daemon=True)
        self._thread.start()
        self._readers = ThreadPoolExecutor(NUM_READERS[self.kind], "store-reader")

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
        self._engines.dispose()

    @property
    def num_waiting(self) -> int:
        """Writes that wait for a transaction."""
        return self._waiting.qsize()

    async def _write_group(self, bodies: Sequence[Body[Any]]) -> list[Any]:
        if self._waiting.qsize() >= MAX_WAITING:
            raise make_error("UNAVAILABLE", f"{MAX_WAITING} writes wait in the store already; try again", 1.0)
        group = _Group(bodies)
        self._waiting.put(group)
        return await asyncio.wrap_future(group.outcomes)

    def _read(self, body: Body[T]) -> T:
        for tries_left in reversed(range(MAX_RERUNS)):
            try:
                with self._engines.reader.begin() as connection, patience(connection):
                    return body(connection)
            except (DataError, OverflowError) as error:
                raise _bad_value(error) from error
            except SQLAlchemyError as error:
                if not (tries_left and isinstance(error, DBAPIError) and may_rerun(error, committing=False)):
                    raise _trouble(error) from error
        raise AssertionError("the last try returns or raises")

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
        """Gives each group its outcomes, or all of them the trouble that the database is in."""
        try:
            with _COMMITS.time():
                outcomes = self._run_and_commit(groups)
        except SQLAlchemyError as error:
            failure = _trouble(error)
            for group in groups:
                group.outcomes.set_exception(failure)
            return
        _SHARED.observe(sum(len(group.bodies) for group in groups))
        failpoints.reach("store.commit.after")
        for group, values in zip(groups, outcomes, strict=True):
            group.outcomes.set_result(values)

    def _run_and_commit(self, groups: list[_Group]) -> list[list[Any]]:
        run: _Run = _run_together
        tries_left = MAX_RERUNS
        while True:
            try:
                return self._transact(groups, run)
            except _BodyFailedError:
                run = _run_each_alone
            except DBAPIError as error:
                tries_left -= 1
                if not (tries_left and may_rerun(error, committing=self._committing)):
                    raise
                log.info("transaction_runs_again", cause=str(error.orig))

    def _transact(self, groups: list[_Group], run: _Run) -> list[list[Any]]:
        self._committing = False
        with self._engines.writer.connect() as connection, patience(connection):
            # Left without a commit, the transaction is rolled back when the connection goes back to its pool.
            transaction = connection.begin()
            outcomes = iter(run(connection, [body for group in groups for body in group.bodies]))
            values = [list(islice(outcomes, len(group.bodies))) for group in groups]
            failpoints.reach("store.commit.before")
            self._committing = True
            transaction.commit()
        return values


def _run_together(connection: Connection, bodies: Sequence[Body[Any]]) -> list[Any]:
    """Returns the bodies' values, those of a kind from one call.

    Raises _BodyFailedError if one of them raised, or DBAPIError when the database itself is in trouble.
    """
    values: list[Any] = [None] * len(bodies)
    kinds: dict[Callable[..., Any], list[int]] = {}
    try:
        for place, body in enumerate(bodies):
            if isinstance(body, Batched):
                kinds.setdefault(body.batch, []).append(place)
            else:
                values[place] = body(connection)
        for batch, places in kinds.items():
            items = [cast(Batched[Any, Any], bodies[place]).item for place in places]
            for place, outcome in zip(places, batch(connection, items), strict=True):
                values[place] = _Failure(outcome) if isinstance(outcome, TreadleError) else outcome
    except DBAPIError as error:
        if is_trouble(error):
            raise
        raise _BodyFailedError from error
    except Exception as error:
        raise _BodyFailedError from error
    return values


def _run_each_alone(connection: Connection, bodies: Sequence[Body[Any]]) -> list[Any]:
    return [_run_alone(connection, body) for body in bodies]


def _run_alone(connection: Connection, body: Body[Any]) -> Any:
    """Returns the body's value or its failure; raises DBAPIError when the database itself is in trouble."""
    for is_last in (False, True):
        savepoint = connection.begin_nested()
        try:
            value = body(connection)
        except DBAPIError as error:
            if is_trouble(error):
                raise
            savepoint.rollback()
            # A row that another replica added meanwhile: the body sees it now and says what it means.
            if isinstance(error, IntegrityError) and not is_last:
                continue
            return _Failure(_bad_value(error) if isinstance(error, DataError) else error)
        except Exception as error:  # noqa: BLE001  The writer thread's guard: one body's fault is its caller's alone.
            savepoint.rollback()
            return _Failure(_bad_value(error) if isinstance(error, OverflowError) else error)
        savepoint.commit()
        return value
    raise AssertionError("the last try returns or raises")


def _value_or_error(outcome: Any) -> Any:  # see _Group
    return outcome.error if isinstance(outcome, _Failure) else outcome


def _bad_value(error: Exception) -> TreadleError:
    """Returns the error for a value that a column cannot hold; the databases differ in when they notice."""
    log.info("value_refused", cause=str(getattr(error, "orig", error)))
    return make_error(
        "BAD_VALUE", "a text that is too long or has a zero byte, or a number beyond 63 bits, cannot be kept"
    )


def _trouble(error: SQLAlchemyError) -> TreadleError:
    _TROUBLE.inc()
    log.error("database_trouble", error=type(error).__name__, cause=str(getattr(error, "orig", error)))
    return make_error("UNAVAILABLE", "the store cannot use its database now; try again", 1.0)
