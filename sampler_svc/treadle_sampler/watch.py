"""Follows the store's news of revisions: fetches those that will be asked for here, forgets those that are gone.

Of a run that publishes faster than revisions are fetched, only the newest is. A broken stream goes on where it was; if
something was missed, everything cached is looked up again before its next use. Knows nothing of requests.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from typing import Final, Literal

from treadle.channel import Backoff
from treadle.errors import TreadleError
from treadle.internal.v1 import revisions_pb2
from treadle.names import parse_adapter
from treadle_engine.lora import AdapterWeights
from treadle_sampler.adapter_cache import AdapterCache, Found
from treadle_sampler.revision_source import found_from
from treadle_service.logs import get_logger
from treadle_service.store_client import StoreClient

Prefetch = Literal["off", "routed", "all"]
NUM_FETCHERS: Final = 2
log = get_logger(__name__)


class RevisionWatch:
    """The sampler's ear at the store; `run_forever` must be running."""

    def __init__(
        self,
        store: StoreClient,
        cache: AdapterCache[AdapterWeights],
        base: str,
        worker: str,
        prefetch: Prefetch,
        *,
        serves: Callable[[str], bool],
        arrive: Callable[[revisions_pb2.RevisionArriving], None],
    ) -> None:
        """`serves` tells whether requests for a run have come here lately; `arrive` reads one that is on its way."""
        self._store, self._cache, self._base, self._worker = store, cache, base, worker
        self._prefetch, self._serves, self._arrive = prefetch, serves, arrive
        self._feed, self._position = "", 0
        self._wanted: OrderedDict[str, Found] = OrderedDict()
        self._has_wanted = asyncio.Semaphore(0)

    async def run_forever(self) -> None:
        """Watches and fetches until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._watch())
                for _ in range(NUM_FETCHERS):
                    group.create_task(self._fetch())
        finally:
            self._cache.watched = False

    async def _watch(self) -> None:
        backoff = Backoff(longest_seconds=2.0)
        while True:
            request = revisions_pb2.WatchRevisionsRequest(
                base=self._base, worker=self._worker, feed=self._feed, after=self._position
            )
            try:
                async for event in self._store.watch_revisions(request):
                    backoff.reset()
                    self._take(event)
            except TreadleError as error:
                log.info("watch_broke", reason=error.reason)
            self._cache.watched = False
            await asyncio.sleep(backoff.next_seconds())

    def _take(self, event: revisions_pb2.WatchRevisionsResponse) -> None:
        self._position = event.position
        match event.WhichOneof("event"):
            case "started":
                self._feed = event.started.feed
                if not event.started.resumed:
                    self._cache.doubt()
                self._cache.watched = True
            case "published":
                run = str(parse_adapter(event.published.name).run_name)
                if self._wants(run, event):
                    if self._wanted.pop(run, None) is None:
                        self._has_wanted.release()
                    self._wanted[run] = found_from(event.published)
            case "arriving":
                if self._wants(event.arriving.run, event):
                    self._arrive(event.arriving)
            case "removed":
                self._cache.drop(event.removed)

    def _wants(self, run: str, event: revisions_pb2.WatchRevisionsResponse) -> bool:
        """Tells whether requests for a run will come here."""
        return self._prefetch != "off" and (self._prefetch == "all" or event.preferred or self._serves(run))

    async def _fetch(self) -> None:
        while True:
            await self._has_wanted.acquire()
            _, found = self._wanted.popitem(last=False)
            await self._cache.prefetch(found)
