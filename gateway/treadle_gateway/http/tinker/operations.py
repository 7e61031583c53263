"""Submits operations of runs and waits for their results: what a training future stands for.

An operation is answered once it is in the run's order and durable; from then on any gateway can answer for it. One
that comes before its turn, as chunks of a batch may, is answered at once, because its sender sends the missing ones
only then: it waits here for them, for a bounded time. Knows nothing of what operations do.
"""

import asyncio
import time
from typing import Final

from google.protobuf.duration_pb2 import Duration

from treadle.errors import TreadleError, make_error
from treadle.names import RunName
from treadle.v1 import training_pb2
from treadle_gateway.http.tinker.ids import OperationId
from treadle_gateway.local_calls import LocalCalls
from treadle_service.logs import get_logger
from treadle_service.principal import current_principal

log = get_logger(__name__)

SEQ_SHIFT: Final = 1
"""The SDK's operation n is our n + 1: the first of ours makes the model, or loads it."""
_SUBMIT_SECONDS: Final = 40.0
"""Shorter than the SDK waits for an answer (60 s)."""
_EARLY_SECONDS: Final = 0.25
_GAP_SECONDS: Final = 600.0
_MAX_EARLY_BYTES: Final = 256 * 2**20
_RETRY_SECONDS: Final = 0.2
_ELSEWHERE_SECONDS: Final = 1.0
_LONGEST_RETRY_SECONDS: Final = 2.0
# What passes without the caller doing anything.
_PASSING: Final = frozenset({"CREDIT_EXCEEDED", "SEQ_GAP"})


class Operations:
    """Operations of all runs, as they pass through this gateway."""

    def __init__(self, calls: LocalCalls) -> None:
        self._calls = calls
        self._sending: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._early_bytes = 0
        self.draining = asyncio.Event()

    async def submit(self, run: RunName, operation: training_pb2.Operation, sampler_seq: int | None = None) -> str:
        """Returns the request id of an operation; raises what refuses it for good, or for now."""
        key = (str(run), operation.seq)
        sending = self._sending.get(key)
        if sending is None:
            sending = asyncio.create_task(self._send(run, operation))
            self._sending[key] = sending
            sending.add_done_callback(lambda done: self._sent(key, done))
        done, _ = await asyncio.wait({sending}, timeout=_EARLY_SECONDS)
        if not done and await self._is_early(run, operation.seq):
            self._keep(sending, operation)
            return str(OperationId(run.run, operation.seq, sampler_seq, int(time.time())))
        if not done:
            done, _ = await asyncio.wait({sending}, timeout=_SUBMIT_SECONDS)
        if not done:
            raise make_error("QUEUE_FULL", "the run's queue has been full for a while; send the same again", 1.0)
        sending.result()
        return str(OperationId(run.run, operation.seq, sampler_seq))

    async def wait(self, wanted: OperationId, seconds: float) -> training_pb2.OperationResult | None:
        """Returns the result of an operation, None if it is not there after `seconds`.

        Raises RUN_NOT_FOUND, RESULT_GONE, and OPERATION_NOT_FOUND for one that never came to its turn.
        """
        run = RunName(current_principal().tenant, wanted.run)
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and not self.draining.is_set():
            timeout = Duration()
            timeout.FromNanoseconds(int(left * 1e9))
            request = training_pb2.WaitOperationRequest(run=str(run), seq=wanted.seq, timeout=timeout)
            try:
                answer = await self._calls.training.WaitOperation(request, timeout=left + 5.0)
            except TreadleError as error:
                if not (error.retryable or self._may_come(run, wanted, error)):
                    raise
                await self._pause(run, wanted, left, error)
                continue
            if answer.done:
                return answer.result
        return None

    def _sent(self, key: tuple[str, int], done: asyncio.Task[None]) -> None:
        del self._sending[key]
        if not done.cancelled():
            done.exception()  # Whoever submitted it has it, if he still waits.

    async def _send(self, run: RunName, operation: training_pb2.Operation) -> None:
        request = training_pb2.SubmitOperationRequest(run=str(run), operation=operation)
        until, pause = time.monotonic() + _GAP_SECONDS, _RETRY_SECONDS
        while True:
            try:
                await self._calls.training.SubmitOperation(request, timeout=_SUBMIT_SECONDS)
            except TreadleError as error:
                passing = error.retryable or error.reason in _PASSING
                if not passing or time.monotonic() > until or self.draining.is_set():
                    raise
                await asyncio.sleep(max(pause, error.retry_after_seconds or 0.0))
                pause = min(pause * 1.5, _LONGEST_RETRY_SECONDS)
            else:
                return

    async def _is_early(self, run: RunName, seq: int) -> bool:
        """Tells whether operations before this one have not been accepted yet."""
        try:
            answer = await self._calls.training.GetRun(training_pb2.GetRunRequest(name=str(run)))
        except TreadleError:
            return False
        return answer.run.next_seq < seq

    def _keep(self, sending: asyncio.Task[None], operation: training_pb2.Operation) -> None:
        size = operation.ByteSize()
        if self._early_bytes + size > _MAX_EARLY_BYTES:
            raise make_error("QUEUE_FULL", "too much waits here for operations that have not come; try again", 1.0)
        self._early_bytes += size

        def on_done(done: asyncio.Task[None]) -> None:
            self._early_bytes -= size
            if not done.cancelled() and done.exception() is not None:
                log.warning("early_operation_dropped", seq=operation.seq, cause=str(done.exception()))

        sending.add_done_callback(on_done)

    async def _pause(self, run: RunName, wanted: OperationId, left: float, error: TreadleError) -> None:
        """Waits for an operation to be accepted if this gateway sends it; else for a moment."""
        sending = self._sending.get((str(run), wanted.seq))
        if sending is not None:
            await asyncio.wait({sending}, timeout=left)
        else:
            pause = _ELSEWHERE_SECONDS if error.reason == "OPERATION_NOT_FOUND" else _RETRY_SECONDS
            await asyncio.sleep(min(left, error.retry_after_seconds or pause))

    def _may_come(self, run: RunName, wanted: OperationId, error: TreadleError) -> bool:
        if error.reason != "OPERATION_NOT_FOUND":
            return False
        waits = wanted.sent_at is not None and time.time() < wanted.sent_at + _GAP_SECONDS
        return waits or (str(run), wanted.seq) in self._sending
