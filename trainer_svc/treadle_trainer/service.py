"""The trainer's servicers: from protos to the trainer and back, nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from google.protobuf.duration_pb2 import Duration

from treadle.errors import TreadleError, make_error
from treadle.internal.v1 import trainer_pb2, trainer_pb2_grpc
from treadle.v1 import training_pb2, training_pb2_grpc
from treadle_service import failpoints
from treadle_service.principal import current_principal
from treadle_trainer.operations import cost_message
from treadle_trainer.resident import Resident
from treadle_trainer.runs import Verdict
from treadle_trainer.streams import MAX_OPERATION_BYTES, OperationStream, as_unary, read_hello
from treadle_trainer.trainer import Trainer

if TYPE_CHECKING:
    import grpc

    # The servicers do not touch the context's messages.
    Context = grpc.aio.ServicerContext[Any, Any]

MAX_WAIT_SECONDS: Final = 30.0
GAP_SECONDS: Final = 10.0
"""How long a single operation waits for the ones before it."""


class TrainerSlot:
    """Where the trainer will be once its base is loaded; calls are answered from the first moment on."""

    def __init__(self) -> None:
        self._trainer: Trainer | None = None

    @property
    def trainer(self) -> Trainer:
        """The trainer; UNAVAILABLE before it is there."""
        if self._trainer is None:
            raise make_error("UNAVAILABLE", "the trainer still loads its base; try again", 1.0)
        return self._trainer

    def fill(self, trainer: Trainer) -> None:
        """Lets calls through."""
        self._trainer = trainer


class TrainingServicer(training_pb2_grpc.TrainingServiceServicer):
    """The operation part of TrainingService; the catalogue part is the gateway's."""

    def __init__(self, slot: TrainerSlot) -> None:
        self._slot = slot

    async def StreamOperations(
        self, request_iterator: AsyncIterator[training_pb2.StreamOperationsRequest], context: Context
    ) -> AsyncIterator[training_pb2.StreamOperationsResponse]:
        """Carries the operations of one run."""
        hello = await read_hello(request_iterator)
        failpoints.reach("trainer.hello")
        resident = await self._open(hello.run)
        resident.check_open()
        if hello.acked_seq:
            resident.acknowledge(hello.acked_seq)
        stream = OperationStream(resident, hello.acked_seq)
        async for response in stream.run(request_iterator, self._slot.trainer.settings.drain_grace_seconds):
            yield response

    async def SubmitOperation(
        self, request: training_pb2.SubmitOperationRequest, context: Context
    ) -> training_pb2.SubmitOperationResponse:
        """Accepts one operation and answers when it is durable."""
        resident, operation = await self._open(request.run), request.operation
        if operation.ByteSize() > MAX_OPERATION_BYTES:
            raise make_error(
                "OPERATION_TOO_LARGE", f"an operation has at most {MAX_OPERATION_BYTES} bytes: cut it by rows"
            )
        try:
            verdict = resident.accept(operation, hold=True)
        except TreadleError as error:
            raise as_unary(error) from error
        if verdict is Verdict.HELD:
            await _await_turn(resident, operation.seq)
        await resident.wait_until(lambda: resident.results.appended_seq >= operation.seq)
        return training_pb2.SubmitOperationResponse(seq=operation.seq, replayed=verdict is Verdict.DUPLICATE)

    async def WaitOperation(
        self, request: training_pb2.WaitOperationRequest, context: Context
    ) -> training_pb2.WaitOperationResponse:
        """Waits for a result."""
        resident, seq = await self._open(request.run), request.seq
        if not 1 <= seq < resident.order.next_seq:
            raise make_error(
                "OPERATION_NOT_FOUND",
                f"{request.run} has no operation {seq}; its next one is {resident.order.next_seq}",
            )
        wanted = request.timeout.ToNanoseconds() / 1e9 if request.HasField("timeout") else MAX_WAIT_SECONDS
        with suppress(TimeoutError):
            async with asyncio.timeout(min(max(wanted, 0.0), MAX_WAIT_SECONDS)):
                await resident.wait_until(lambda: resident.results.shown_seq >= seq)
        if resident.results.shown_seq < seq:
            return training_pb2.WaitOperationResponse(done=False)
        result = resident.result(seq)
        if result is None:
            stored = await self._slot.trainer.read_result(request.run, seq)
            result = training_pb2.OperationResult.FromString(stored)
            result.replayed = True
        return training_pb2.WaitOperationResponse(done=True, result=result)

    async def CancelOperations(
        self, request: training_pb2.CancelOperationsRequest, context: Context
    ) -> training_pb2.CancelOperationsResponse:
        """Cancels what has not started; answers when that is durable."""
        resident = await self._open(request.run)
        seqs = resident.cancel(request.from_seq)
        if seqs:
            await resident.wait_until(lambda: resident.results.shown_seq >= seqs[-1])
        return training_pb2.CancelOperationsResponse(cancelled_seqs=seqs)

    async def CreateRun(
        self, request: training_pb2.CreateRunRequest, context: Context
    ) -> training_pb2.CreateRunResponse:
        """Is answered by the gateway."""
        raise _not_here("CreateRun")

    async def GetRun(self, request: training_pb2.GetRunRequest, context: Context) -> training_pb2.GetRunResponse:
        """Is answered by the gateway."""
        raise _not_here("GetRun")

    async def ListRuns(self, request: training_pb2.ListRunsRequest, context: Context) -> training_pb2.ListRunsResponse:
        """Is answered by the gateway."""
        raise _not_here("ListRuns")

    async def DeleteRun(
        self, request: training_pb2.DeleteRunRequest, context: Context
    ) -> training_pb2.DeleteRunResponse:
        """Is answered by the gateway."""
        raise _not_here("DeleteRun")

    async def _open(self, run: str) -> Resident:
        return await self._slot.trainer.open(run, current_principal().tenant)


class TrainerServicer(trainer_pb2_grpc.TrainerServiceServicer):
    """Looks into the trainer; for the services of the deployment."""

    def __init__(self, slot: TrainerSlot) -> None:
        self._slot = slot

    async def GetTrainerStatus(
        self, request: trainer_pb2.GetTrainerStatusRequest, context: Context
    ) -> trainer_pb2.GetTrainerStatusResponse:
        """Returns load and totals."""
        _require_internal()
        trainer, trace = self._slot.trainer, self._slot.trainer.trace
        return trainer_pb2.GetTrainerStatusResponse(
            resident_runs=trainer.runs_in_memory,
            queued_operations=trainer.queue_depth,
            num_passes=trace.num_passes,
            num_tokens=trace.num_tokens,
            busy=_duration(trace.busy_seconds),
            num_shared_passes=trace.num_shared_passes,
            max_tokens_per_pass=trainer.budget.max_tokens,
            pass_cost=cost_message(trainer.budget.cost),
            pace=trainer.pace,
            target_pass=_duration(trainer.budget.target_seconds),
        )

    async def ListPasses(
        self, request: trainer_pb2.ListPassesRequest, context: Context
    ) -> trainer_pb2.ListPassesResponse:
        """Returns the last passes."""
        _require_internal()
        passes = self._slot.trainer.trace.last(request.limit or 100, request.after.ToNanoseconds())
        return trainer_pb2.ListPassesResponse(passes=passes)

    async def ComputeChunks(
        self, request_iterator: AsyncIterator[trainer_pb2.ComputeChunksRequest], context: Context
    ) -> AsyncIterator[trainer_pb2.ComputeChunksResponse]:
        """Computes chunks of another trainer's run."""
        _require_internal()
        async for response in self._slot.trainer.compute_chunks(request_iterator):
            yield response

    async def EvictRun(self, request: trainer_pb2.EvictRunRequest, context: Context) -> trainer_pb2.EvictRunResponse:
        """Hands a run over."""
        _require_internal()
        await self._slot.trainer.evict(request.run)
        return trainer_pb2.EvictRunResponse()

    async def OfferRun(self, request: trainer_pb2.OfferRunRequest, context: Context) -> trainer_pb2.OfferRunResponse:
        """Decides about a run that another trainer would hand over."""
        _require_internal()
        return trainer_pb2.OfferRunResponse(accepted=self._slot.trainer.rebalancer.consider(request))

    async def TakeRun(self, request: trainer_pb2.TakeRunRequest, context: Context) -> trainer_pb2.TakeRunResponse:
        """Claims and loads a run."""
        _require_internal()
        await self._slot.trainer.rebalancer.take(request.run)
        return trainer_pb2.TakeRunResponse()


async def _await_turn(resident: Resident, seq: int) -> None:
    try:
        async with asyncio.timeout(GAP_SECONDS):
            await resident.wait_until(lambda: resident.order.next_seq > seq)
    except TimeoutError as error:
        expected = resident.order.next_seq
        raise make_error("SEQ_GAP", f"the run expects seq {expected}, got {seq}: send from {expected} on") from error
    finally:
        resident.order.forget_held(seq)


def _duration(seconds: float) -> Duration:
    message = Duration()
    message.FromNanoseconds(int(seconds * 1e9))
    return message


def _not_here(method: str) -> TreadleError:
    return make_error("UNIMPLEMENTED", f"{method} is answered by the gateway; a trainer carries operations only")


def _require_internal() -> None:
    if current_principal().tenant:
        raise make_error("PERMISSION_DENIED", "this call is for the services of the deployment")
