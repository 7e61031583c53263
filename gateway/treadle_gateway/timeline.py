"""What all workers did lately: asked of them when somebody looks, once for all who look, and only what is new.

Kept here for minutes, in memory: another gateway, or this one after a restart, asks the workers anew. Knows nothing of
how a timeline is drawn.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, cast

import grpc

from treadle.internal.v1 import sampler_pb2, sampler_pb2_grpc, trainer_pb2, trainer_pb2_grpc
from treadle.v1 import admin_pb2, timeline_pb2
from treadle_gateway.directory import Directory
from treadle_gateway.forward import Upstreams
from treadle_gateway.routing import WorkerView
from treadle_gateway.spans import as_seen_by, joined_steps, span_of_pass
from treadle_service.logs import get_logger
from treadle_service.principal import current_principal

if TYPE_CHECKING:
    Handler = grpc.RpcMethodHandler[Any, Any]  # Any: see handlers.
    ListContext = grpc.aio.ServicerContext[timeline_pb2.ListSpansRequest, timeline_pb2.ListSpansResponse]

MAX_SPANS: Final = 2000
# Of all workers together: an answer must stay a message.
MAX_ANSWER_BYTES: Final = 3 * 2**20
KEPT_SPANS: Final = 4000
FRESH_SECONDS: Final = 0.5
_PASSES: Final = 1000
_STEPS: Final = 5000
_ASK_SECONDS: Final = 3.0
_KINDS: Final = {"trainer": admin_pb2.WORKER_KIND_TRAINER, "sampler": admin_pb2.WORKER_KIND_SAMPLER}
log = get_logger(__name__)


class Lane:
    """What is known of one worker."""

    def __init__(self) -> None:
        self.spans: deque[timeline_pb2.Span] = deque(maxlen=KEPT_SPANS)
        self.newest_ns = 0
        """When the last pass or decode step that was heard of began."""

    def add_passes(self, passes: Sequence[trainer_pb2.Pass]) -> None:
        """Adds passes, oldest first."""
        self.spans.extend(map(span_of_pass, passes))
        self._note(passes)

    def add_steps(self, steps: Sequence[sampler_pb2.DecodeStep]) -> None:
        """Adds decode steps, oldest first."""
        self.spans.extend(joined_steps(steps))
        self._note(steps)

    def after(self, after_ns: int, limit: int) -> list[timeline_pb2.Span]:
        """Returns the newest spans that began later, oldest first."""
        newer = (span for span in reversed(self.spans) if span.started.ToNanoseconds() > after_ns)
        return list(islice(newer, limit))[::-1]

    def _note(self, heard: Sequence[trainer_pb2.Pass] | Sequence[sampler_pb2.DecodeStep]) -> None:
        if heard:
            self.newest_ns = heard[-1].started.ToNanoseconds()


class Timeline:
    """The lanes of all live workers."""

    def __init__(self, directory: Directory, upstreams: Upstreams, clock: Callable[[], float] = time.monotonic) -> None:
        self._directory = directory
        self._upstreams = upstreams
        self._clock = clock
        self._lanes: dict[WorkerView, Lane] = {}
        self._refreshed_at = float("-inf")
        self._refreshing = asyncio.Lock()

    def handlers(self) -> dict[str, "Handler"]:
        """Returns the handlers by path."""
        make = cast(Any, grpc.unary_unary_rpc_method_handler)  # types-grpcio knows only synchronous behaviours.
        handler = make(
            self.list_spans,
            request_deserializer=timeline_pb2.ListSpansRequest.FromString,
            response_serializer=timeline_pb2.ListSpansResponse.SerializeToString,
        )
        return {"/treadle.v1.TimelineService/ListSpans": handler}

    async def list_spans(
        self, request: timeline_pb2.ListSpansRequest, _: "ListContext | None" = None
    ) -> timeline_pb2.ListSpansResponse:
        """Returns the last spans as the caller may see them."""
        principal = current_principal()
        await self._refresh()
        limit = min(request.limit or MAX_SPANS, MAX_SPANS)
        room = MAX_ANSWER_BYTES // max(1, len(self._lanes))
        answer = timeline_pb2.ListSpansResponse()
        for worker, lane in sorted(self._lanes.items(), key=lambda item: item[0].worker):
            spans = [as_seen_by(span, principal) for span in lane.after(request.after.ToNanoseconds(), limit)]
            answer.workers.add(
                worker=worker.worker, kind=_KINDS[worker.kind], base=worker.base, spans=_newest_within(spans, room)
            )
        return answer

    async def _refresh(self) -> None:
        """Asks all live workers for what is new, unless that was done a moment ago."""
        async with self._refreshing:
            if self._clock() - self._refreshed_at < FRESH_SECONDS:
                return
            live = {_place(worker): worker for worker in self._directory.table.workers}
            self._lanes = {place: self._lanes.get(place, Lane()) for place in live}
            await asyncio.gather(*(self._ask(place, lane) for place, lane in self._lanes.items()))
            self._refreshed_at = self._clock()

    async def _ask(self, worker: WorkerView, lane: Lane) -> None:
        options: dict[str, Any] = {  # Any: arguments of a stub's call.
            "metadata": self._directory.internal_metadata(None),
            "timeout": _ASK_SECONDS,
        }
        try:
            with self._upstreams.use(worker.address) as channel:
                if worker.kind == "trainer":
                    passes = trainer_pb2.ListPassesRequest(limit=_PASSES)
                    passes.after.FromNanoseconds(lane.newest_ns)
                    trainer = trainer_pb2_grpc.TrainerServiceStub(channel)
                    lane.add_passes((await trainer.ListPasses(passes, **options)).passes)
                else:
                    steps = sampler_pb2.ListDecodeStepsRequest(limit=_STEPS)
                    steps.after.FromNanoseconds(lane.newest_ns)
                    sampler = sampler_pb2_grpc.SamplerServiceStub(channel)
                    lane.add_steps((await sampler.ListDecodeSteps(steps, **options)).steps)
        except grpc.aio.AioRpcError as error:
            # Its lane ends where it was heard of last.
            log.info("worker_silent", worker=worker.worker, code=error.code().name)


def _place(worker: WorkerView) -> WorkerView:
    """Returns what a lane is kept under: a worker that moved or was exchanged has a new one."""
    return WorkerView(worker.worker, worker.kind, worker.base, worker.address)


def _newest_within(spans: Iterable[timeline_pb2.Span], room: int) -> list[timeline_pb2.Span]:
    kept: list[timeline_pb2.Span] = []
    for span in reversed(list(spans)):
        room -= span.ByteSize() + 4
        if room < 0:
            break
        kept.append(span)
    return kept[::-1]
