"""Revisions in memory: loaded once however many ask at once, evicted when long unused, never while in use.

A cached revision is checked against the store from time to time, so that a deleted one does not live on; while the
store is away, what is cached keeps serving. Knows nothing of where revisions come from or what they hold.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from treadle.errors import NotFoundError, UnavailableError

LoadedT = TypeVar("LoadedT", bound="Loaded")
LoadedT_co = TypeVar("LoadedT_co", bound="Loaded", covariant=True)


class Loaded(Protocol):
    """A revision in memory."""

    @property
    def num_bytes(self) -> int:
        """Memory held, in bytes."""
        ...


class Source(Protocol[LoadedT_co]):
    """Where revisions come from."""

    async def version(self, name: str) -> str:
        """Returns a word for the revision's content; raises NotFoundError when there is no such revision."""
        ...

    async def load(self, name: str) -> LoadedT_co:
        """Returns the revision."""
        ...


@dataclass
class _Entry(Generic[LoadedT]):
    task: asyncio.Task[LoadedT]
    version: str
    checked: float
    num_users: int = 0

    @property
    def num_bytes(self) -> int:
        if not self.task.done() or self.task.cancelled() or self.task.exception() is not None:
            return 0
        return self.task.result().num_bytes


class AdapterCache(Generic[LoadedT]):
    """A bounded cache by name; for one event loop."""

    def __init__(
        self,
        source: Source[LoadedT],
        clock: Callable[[], float],
        *,
        max_entries: int,
        max_bytes: int,
        lookup_seconds: float,
    ) -> None:
        self._source = source
        self._clock = clock
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._lookup_seconds = lookup_seconds
        self._entries: OrderedDict[str, _Entry[LoadedT]] = OrderedDict()

    @property
    def names(self) -> list[str]:
        """Revisions in memory or on their way, least recently used first."""
        return list(self._entries)

    @property
    def num_bytes(self) -> int:
        """Memory of all revisions, in bytes."""
        return sum(entry.num_bytes for entry in self._entries.values())

    @asynccontextmanager
    async def lease(self, name: str) -> AsyncIterator[LoadedT]:
        """Gives the revision and keeps it for as long as the context lasts."""
        entry = await self._entry(name)
        entry.num_users += 1
        try:
            # Shielded: a caller that goes away must not break the load for the others that wait.
            yield await asyncio.shield(entry.task)
        finally:
            entry.num_users -= 1
            self._evict()

    async def _entry(self, name: str) -> _Entry[LoadedT]:
        entry = self._entries.get(name)
        now = self._clock()
        if entry is None or now - entry.checked >= self._lookup_seconds:
            version = await self._version(name, entry)
            # Read again: others may have come this way while the store was asked.
            entry = self._entries.get(name)
            if entry is None or entry.version != version:
                entry = _Entry(asyncio.create_task(self._source.load(name)), version, now)
                entry.task.add_done_callback(lambda task: self._loaded(name, task))
                self._entries[name] = entry
            entry.checked = now
        self._entries.move_to_end(name)
        return entry

    async def _version(self, name: str, entry: _Entry[LoadedT] | None) -> str:
        try:
            return await self._source.version(name)
        except NotFoundError:
            self._entries.pop(name, None)
            raise
        except UnavailableError:
            if entry is None:
                raise
            return entry.version

    def _loaded(self, name: str, task: asyncio.Task[LoadedT]) -> None:
        """Forgets a load that failed, so that the next request tries again; else makes room for it."""
        entry = self._entries.get(name)
        if task.cancelled() or task.exception() is not None:
            if entry is not None and entry.task is task:
                del self._entries[name]
            return
        self._evict()

    def _evict(self) -> None:
        for name, entry in list(self._entries.items()):
            if len(self._entries) <= self._max_entries and self.num_bytes <= self._max_bytes:
                return
            if not entry.num_users and entry.task.done():
                del self._entries[name]
