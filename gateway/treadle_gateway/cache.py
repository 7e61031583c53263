"""A small cache for answers of the store: bounded, short-lived, one question at a time per key.

Failures are never kept. Knows nothing of what it holds.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class AsyncCache(Generic[K, V]):
    """Remembers what a coroutine answered for a key, for `ttl_seconds`."""

    def __init__(
        self, ttl_seconds: float, max_entries: int = 10_000, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._ttl_seconds = ttl_seconds
        self._max_entries = max_entries
        self._clock = clock
        self._entries: OrderedDict[K, tuple[asyncio.Future[V], float]] = OrderedDict()

    async def get(self, key: K, load: Callable[[], Awaitable[V]]) -> V:
        """Returns the remembered answer, or the one that `load` gives; callers who ask meanwhile share it."""
        entry = self._entries.get(key)
        # A question under way is shared however old it is: the answer is not older than its arrival.
        if entry is None or (entry[0].done() and entry[1] <= self._clock()):
            entry = (asyncio.ensure_future(load()), self._clock() + self._ttl_seconds)
            self._entries[key] = entry
            self._entries.move_to_end(key)
            future = entry[0]
            future.add_done_callback(lambda done: self._forget_failure(key, done))
            while len(self._entries) > self._max_entries:
                self._entries.popitem(last=False)
        # Shielded: one caller that gives up must not cancel the question for the others.
        return await asyncio.shield(entry[0])

    def drop(self, key: K) -> None:
        """Forgets a key."""
        self._entries.pop(key, None)

    def clear(self) -> None:
        """Forgets everything; who waits for an answer still gets it."""
        self._entries.clear()

    def _forget_failure(self, key: K, done: asyncio.Future[V]) -> None:
        if done.cancelled() or done.exception() is not None:
            entry = self._entries.get(key)
            if entry is not None and entry[0] is done:
                del self._entries[key]
