"""RevisionService: tells samplers of new and of vanished revisions, and which of them will be asked for which."""

from collections.abc import AsyncIterator

from treadle.internal.v1 import revisions_pb2, revisions_pb2_grpc
from treadle.names import parse_adapter, parse_run
from treadle.v1 import admin_pb2
from treadle_service.principal import INTERNAL_SCOPE, current_principal
from treadle_service.rendezvous import rank
from treadle_store.revision_feed import RevisionEvent, RevisionFeed
from treadle_store.workers import WorkerRegistry

Response = revisions_pb2.WatchRevisionsResponse


class RevisionService(revisions_pb2_grpc.RevisionServiceServicer):
    """Streams news of revisions."""

    def __init__(self, feed: RevisionFeed, workers: WorkerRegistry) -> None:
        self._feed = feed
        self._workers = workers

    async def WatchRevisions(
        self, request: revisions_pb2.WatchRevisionsRequest, context: object
    ) -> AsyncIterator[Response]:
        """Streams the events of a base until the caller or the store goes."""
        current_principal().require(INTERNAL_SCOPE)
        feed, position = self._feed, request.after
        resumed = request.feed == feed.id and feed.holds(position)
        started = False
        while not feed.closed:
            if not started or not feed.holds(position):
                resumed, started = resumed and not started, True
                position = position if resumed else feed.position
                yield Response(position=position, started=revisions_pb2.WatchStarted(feed=feed.id, resumed=resumed))
            # Taken once: while a slow watcher reads, the feed may move on and even drop these.
            events, seen = feed.after(position, request.base), feed.position
            for event in events:
                yield self._response(event, request.worker)
            position = seen
            await feed.wait(position)

    async def AnnounceRevision(
        self, request: revisions_pb2.AnnounceRevisionRequest, context: object
    ) -> revisions_pb2.AnnounceRevisionResponse:
        """Passes on that a revision is on its way."""
        current_principal().require(INTERNAL_SCOPE)
        parse_run(request.revision.run)
        self._feed.arriving(request.base, request.revision)
        return revisions_pb2.AnnounceRevisionResponse()

    def _response(self, event: RevisionEvent, worker: str) -> Response:
        if event.arriving is not None:
            preferred = self._is_preferred(event.arriving.run, event.base, worker)
            return Response(position=event.position, preferred=preferred, arriving=event.arriving)
        if event.adapter is None:
            return Response(position=event.position, removed=event.name)
        preferred = self._is_preferred(str(parse_adapter(event.name).run_name), event.base, worker)
        return Response(position=event.position, preferred=preferred, published=event.adapter)

    def _is_preferred(self, run: str, base: str, worker: str) -> bool:
        samplers = [
            entry.worker.worker
            for entry in self._workers.live()
            if entry.worker.kind == admin_pb2.WORKER_KIND_SAMPLER
            and entry.worker.base == base
            and not entry.worker.draining
        ]
        return rank(run, samplers)[:1] == [worker]
