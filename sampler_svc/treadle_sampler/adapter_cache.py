"""Revisions in memory: loaded once however many ask at once, evicted when long unused, never while in use.

A revision is fetched when it is asked for, or ahead of that when news of it comes. A cached one is checked against the
store from time to time, so that a deleted one does not live on; while the store is away, what is cached keeps serving.
Knows nothing of where revisions come from or what they hold.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from treadle.errors import NotFoundError, TreadleError, UnavailableError
from treadle_service.logs import get_logger

LoadedT = TypeVar("LoadedT", bound="Loaded")
LoadedT_co = TypeVar("LoadedT_co", bound="Loaded", covariant=True)
log = get_logger(__name__)


class Loaded(Protocol):
    """A revision in memory."""

    @property
    def num_bytes(self) -> int:
        """Memory held, in bytes."""
        ...


@dataclass(frozen=True, slots=True)
class Found:
    """A revision as the store has it: its name, and its files as pairs (path, sha256)."""

    name: str
    files: tuple[tuple[str, str], ...]


class Source(Protocol[LoadedT_co]):
    """Where revisions come from."""

    async def lookup(self, name: str) -> Found:
        """Returns what a name stands for; raises NotFoundError when there is no such revision."""
        ...

    async def load(self, found: Found) -> LoadedT_co:
        """Returns the revision, whole and checked."""
        ...


@dataclass
class _Entry(Generic[LoadedT]):
    task: asyncio.Task[LoadedT]
    found: Found
    checked: float
    num_users: int = 0
    num_bytes: int = 0
    was_used: bool = False


class AdapterCache(Generic[LoadedT]):
    """A bounded cache by name; for one event loop."""

    def __init__(
        self,
        source: Source[LoadedT],
        clock: Callable[[], float],
        *,
        max_entries: int,
        max_bytes: int,
        max_unused_bytes: int,
        lookup_seconds: float,
    ) -> None:
        """At most `max_unused_bytes` hold what was fetched ahead and has not been asked for yet."""
        self._source = source
        self._clock = clock
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._max_unused_bytes = max_unused_bytes
        self._lookup_seconds = lookup_seconds
        self._entries: OrderedDict[str, _Entry[LoadedT]] = OrderedDict()
        self._checks: set[asyncio.Task[None]] = set()
        self.num_bytes = 0
        """Memory of all revisions, in bytes."""
        self.watched = False
        """News of deletions arrive: a look at the store may come after the use of what is cached."""

    @property
    def names(self) -> list[str]:
        """Revisions in memory or on their way, least recently used first."""
        return list(self._entries)

    @asynccontextmanager
    async def lease(self, name: str) -> AsyncIterator[LoadedT]:
        """Gives the revision and keeps it for as long as the context lasts."""
        entry = await self._entry(name)
        entry.num_users += 1
        entry.was_used = True
        try:
            # Shielded: a caller that goes away must not break the load for the others that wait.
            yield await asyncio.shield(entry.task)
        finally:
            entry.num_users -= 1
            self._evict()

    async def prefetch(self, found: Found) -> None:
        """Loads a revision of which news came, unless it is here; what is wrong with it is for those who ask for it."""
        entry = self._entries.get(found.name)
        if entry is None or entry.found != found:
            entry = self._start(found)
        entry.checked = self._clock()
        try:
            await asyncio.shield(entry.task)
        except TreadleError as error:
            log.warning("prefetch_failed", name=found.name, reason=error.reason, message=error.message)

    def drop(self, name: str) -> None:
        """Forgets a revision; those who use it keep it until they are done."""
        entry = self._entries.pop(name, None)
        if entry is not None:
            self.num_bytes -= entry.num_bytes

    def doubt(self) -> None:
        """Has every revision looked up again before its next use: deletions may have been missed."""
        for entry in self._entries.values():
            entry.checked = float("-inf")

    async def _entry(self, name: str) -> _Entry[LoadedT]:
        entry = self._entries.get(name)
        now = self._clock()
        if entry is None or now - entry.checked >= self._lookup_seconds:
            if entry is not None and self.watched and entry.checked != float("-inf"):
                entry.checked = now
                self._check_beside(name)
            else:
                entry = await self._checked(name, entry)
        self._entries.move_to_end(name)
        return entry

    async def _checked(self, name: str, entry: _Entry[LoadedT] | None) -> _Entry[LoadedT]:
        """Returns the entry for what the store has under the name now."""
        now = self._clock()
        try:
            found = await self._source.lookup(name)
        except NotFoundError:
            self.drop(name)
            raise
        except UnavailableError:
            if entry is None:
                raise
            found = entry.found
        # Read again: others may have come this way while the store was asked.
        entry = self._entries.get(name)
        if entry is None or entry.found != found:
            entry = self._start(found)
        entry.checked = now
        return entry

    def _check_beside(self, name: str) -> None:
        async def check() -> None:
            try:
                found = await self._source.lookup(name)
            except NotFoundError:
                self.drop(name)
                return
            except TreadleError:
                return
            entry = self._entries.get(name)
            if entry is not None and entry.found != found:
                self.drop(name)

        task = asyncio.create_task(check())
        self._checks.add(task)
        task.add_done_callback(self._checks.discard)

    def _start(self, found: Found) -> _Entry[LoadedT]:
        self.drop(found.name)
        entry = _Entry(asyncio.create_task(self._source.load(found)), found, self._clock())
        entry.task.add_done_callback(lambda _: self._loaded(entry))
        self._entries[found.name] = entry
        return entry

    def _loaded(self, entry: _Entry[LoadedT]) -> None:
        """Forgets a load that failed, so that the next request tries again; else makes room for it."""
        current = self._entries.get(entry.found.name) is entry
        if entry.task.cancelled() or entry.task.exception() is not None:
            if current:
                del self._entries[entry.found.name]
            return
        if current:
            entry.num_bytes = entry.task.result().num_bytes
            self.num_bytes += entry.num_bytes
            self._evict_unused()
            self._evict()

    def _evict(self) -> None:
        while len(self._entries) > self._max_entries or self.num_bytes > self._max_bytes:
            free = (name for name, entry in self._entries.items() if not entry.num_users and entry.task.done())
            name = next(free, None)
            if name is None:
                return
            self.drop(name)

    def _evict_unused(self) -> None:
        unused = [entry for entry in self._entries.values() if not entry.was_used and entry.task.done()]
        num_bytes = sum(entry.num_bytes for entry in unused)
        for entry in unused[:-1]:
            if num_bytes <= self._max_unused_bytes:
                return
            num_bytes -= entry.num_bytes
            self.drop(entry.found.name)
