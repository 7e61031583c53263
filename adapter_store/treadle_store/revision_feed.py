"""News of revisions in the order in which they became durable, for watchers who may come back after a break.

Kept in memory and bounded: a watcher that was away for too long, or a restart of the store, is told that something was
missed. Lives on one event loop. Knows nothing of who watches.
"""

import asyncio
import secrets
from collections import deque
from dataclasses import dataclass
from typing import Final

from treadle.internal.v1 import revisions_pb2
from treadle.v1 import adapters_pb2

MAX_EVENTS: Final = 4096


@dataclass(frozen=True, slots=True)
class RevisionEvent:
    """A revision that was published, is on its way (under its run's name) or, with neither, was removed."""

    position: int
    base: str
    name: str
    adapter: adapters_pb2.Adapter | None = None
    arriving: revisions_pb2.RevisionArriving | None = None


class RevisionFeed:
    """The last events, numbered from 1."""

    def __init__(self, max_events: int = MAX_EVENTS) -> None:
        self.id = secrets.token_hex(8)
        self.position = 0
        self.closed = False
        self._events: deque[RevisionEvent] = deque(maxlen=max_events)
        self._moved = asyncio.Event()

    def published(self, adapter: adapters_pb2.Adapter) -> None:
        """Tells of a saved adapter; only revisions are news."""
        if "/revisions/" in adapter.name:
            self._add(adapter.base, adapter.name, adapter)

    def arriving(self, base: str, revision: revisions_pb2.RevisionArriving) -> None:
        """Tells of a revision that may be published soon."""
        self._add(base, revision.run, arriving=revision)

    def removed(self, base: str, name: str) -> None:
        """Tells of a deleted or collected revision."""
        self._add(base, name)

    def holds(self, position: int) -> bool:
        """Tells whether everything after `position` is still here."""
        return self.position - len(self._events) <= position <= self.position

    def after(self, position: int, base: str) -> list[RevisionEvent]:
        """Returns a base's events after `position`, which must be held."""
        return [event for event in self._events if event.position > position and event.base == base]

    async def wait(self, position: int) -> None:
        """Waits until there is something after `position`, or until the feed is closed."""
        while self.position <= position and not self.closed:
            await self._moved.wait()

    def close(self) -> None:
        """Ends all waits: the store is about to stop."""
        self.closed = True
        self._wake()

    def _add(
        self,
        base: str,
        name: str,
        adapter: adapters_pb2.Adapter | None = None,
        arriving: revisions_pb2.RevisionArriving | None = None,
    ) -> None:
        self.position += 1
        self._events.append(RevisionEvent(self.position, base, name, adapter, arriving))
        self._wake()

    def _wake(self) -> None:
        self._moved.set()
        self._moved = asyncio.Event()
