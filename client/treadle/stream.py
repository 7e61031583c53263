"""The operation stream of one run: sends what callers submit, in order, and hands back results, over any disconnect.

One task on the SDK's thread keeps a StreamOperations call open while there is work, says Hello with what it has
received, resumes from the server's Welcome, and tries again with growing waits. Its books are kept by the ledger.
Knows nothing of what operations mean.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Final

import grpc
import grpc.aio

from treadle import spans
from treadle.channel import Backoff, Transport, failure_of
from treadle.errors import CancelledOperationError, SequenceError, TreadleError, UnavailableError, from_operation_error
from treadle.frames import MAX_FRAME_BYTES, frames_of
from treadle.ledger import OperationLedger, PreparedOperation
from treadle.v1 import training_pb2

PROTOCOL: Final = 1
ACK_EVERY_RESULTS: Final = 8
ACK_AFTER_SECONDS: Final = 1.0
# Whoever loads the run goes on loading it when this connection is given up; the next one finds it further on.
WELCOME_SECONDS: Final = 30.0
GOODBYE_SECONDS: Final = 2.0
# A run stands still while its client waits: the pause decides how much longer than its trainer was away.
LONGEST_PAUSE_SECONDS: Final = 0.5
# A connection that held this long after its Welcome counts as progress.
STABLE_SECONDS: Final = 10.0

Results = list[training_pb2.OperationResult]
Frame = training_pb2.StreamOperationsRequest
# grpc.aio's call is generic in both directions; requests are bytes that were framed by hand.
StreamCall = Any

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class Submission:
    """Operations that belong together, in the order of calls; `operations` may be filled in later."""

    operations: list[PreparedOperation] | None
    results: "Future[Results]" = field(default_factory=Future)
    collected: Results = field(default_factory=list)
    submitted: float = field(default_factory=time.time)
    caller: Any = field(default_factory=spans.current_span_context)
    """What the caller traces, if it does."""

    @property
    def num_bytes(self) -> int:
        """Size of the operations on the wire, nearly."""
        return sum(operation.num_bytes for operation in self.operations or ())


class OperationStream:
    """Sends a run's operations exactly once and in order; `submit` and `fill` may be called from any thread."""

    def __init__(self, transport: Transport, run: str, first_seq: int) -> None:
        self._transport = transport
        self._run = run
        self._settings = transport.settings
        self._ledger = OperationLedger(first_seq)
        self._waiting: deque[Submission] = deque()
        self._by_seq: dict[int, Submission] = {}
        self._failure: TreadleError | None = None
        self._closing = False
        self._draining = False
        self._welcomed_at: float | None = None
        self._max_frame_bytes = MAX_FRAME_BYTES
        # Callers wait on the condition while too many bytes are piled up.
        self._backlog_bytes = 0
        self._backlog = threading.Condition()
        transport.wait(self._start())

    def submit(self, operations: list[PreparedOperation] | None) -> Submission:
        """Puts operations at the end of the run's order; None reserves the place until `fill`.

        Returns at once, unless more than the allowed backlog is piled up; then it waits for room.
        """
        submission = Submission(operations)
        self._reserve(submission.num_bytes)
        self._transport.call_soon(lambda: self._enqueue(submission))
        return submission

    def fill(self, submission: Submission, operations: list[PreparedOperation]) -> None:
        """Gives a reserved place its operations."""
        with self._backlog:
            # It does not wait: everything behind it stands still until it is filled.
            self._backlog_bytes += sum(operation.num_bytes for operation in operations)

        def fill_in() -> None:
            submission.operations = operations
            self._release()

        self._transport.call_soon(fill_in)

    async def close(self, wait_seconds: float) -> None:
        """Waits for outstanding results, says Goodbye, and fails what is left."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_seconds):
                while self._has_work() and self._failure is None:
                    self._progress.clear()
                    await self._progress.wait()
        self._closing = True
        self._wake.set()
        self._wanted.set()
        await asyncio.wait([self._task], timeout=GOODBYE_SECONDS)
        self._task.cancel()
        self._fail(CancelledOperationError("the client was closed before the result came; the operation may still run"))

    async def _start(self) -> None:
        self._wake = asyncio.Event()  # The writer has something to look at.
        self._wanted = asyncio.Event()  # A connection is worth having.
        self._progress = asyncio.Event()  # A result came.
        self._wanted.set()
        self._method: StreamCall = self._transport.ops_channel.stream_stream(
            "/treadle.v1.TrainingService/StreamOperations",
            request_serializer=None,
            response_deserializer=training_pb2.StreamOperationsResponse.FromString,
        )
        self._task = asyncio.create_task(self._keep_connected(), name=f"stream {self._run}")
        self._task.add_done_callback(self._on_task_done)

    def _reserve(self, num_bytes: int) -> None:
        with self._backlog:
            # The SDK's own thread must not wait for itself.
            if not self._transport.on_own_thread:
                self._backlog.wait_for(
                    lambda: (
                        self._failure is not None
                        or self._backlog_bytes == 0
                        or self._backlog_bytes + num_bytes <= self._settings.max_backlog_bytes
                    )
                )
            if self._failure is not None:
                raise _copy_of(self._failure)
            self._backlog_bytes += num_bytes

    def _unreserve(self, num_bytes: int) -> None:
        with self._backlog:
            self._backlog_bytes -= num_bytes
            self._backlog.notify_all()

    def _enqueue(self, submission: Submission) -> None:
        if self._failure is not None:
            submission.results.set_exception(_copy_of(self._failure))
            return
        self._waiting.append(submission)
        self._release()

    def _release(self) -> None:
        """Gives seqs to the submissions at the front that are filled in."""
        while self._waiting and self._waiting[0].operations is not None:
            submission = self._waiting.popleft()
            for seq in self._ledger.add(submission.operations or []):
                self._by_seq[seq] = submission
        self._wake.set()
        if self._ledger.num_kept:
            self._wanted.set()

    def _has_work(self) -> bool:
        return bool(self._ledger.num_kept or self._waiting)

    async def _keep_connected(self) -> None:
        backoff, loop = Backoff(longest_seconds=LONGEST_PAUSE_SECONDS), asyncio.get_running_loop()
        failing_since: float | None = None
        while not self._closing:
            await self._wanted.wait()
            received, self._welcomed_at = self._ledger.received_seq, None
            failure: TreadleError = UnavailableError("the service ended the stream")
            again = True
            try:
                if await self._serve(backoff):
                    return
            except grpc.aio.AioRpcError as error:
                failure, again = failure_of(error)
            except (SequenceError, UnavailableError) as error:
                # A result is missing, or an old trainer answered; Hello says what has been received.
                failure = error
            except TreadleError as error:
                failure, again = error, False
            if not again:
                self._fail(failure)
                return
            held = self._welcomed_at is not None and loop.time() - self._welcomed_at > STABLE_SECONDS
            if self._ledger.received_seq > received or held:
                failing_since = None
            failing_since = failing_since or loop.time()
            if not self._has_work():
                self._wanted.clear()
                failing_since = None
            elif loop.time() - failing_since > self._settings.give_up_after_seconds:
                self._fail(UnavailableError(f"gave up after {self._settings.give_up_after_seconds:.0f} s: {failure}"))
                return
            _log.info("stream of %s broke, connecting again: %s", self._run, failure)
            await asyncio.sleep(max(backoff.next_seconds(), failure.retry_after_seconds or 0.0))

    async def _serve(self, backoff: Backoff) -> bool:
        """Holds one connection until it ends; returns True after a clean Goodbye."""
        metadata = (*self._transport.metadata, ("x-treadle-run", self._run))
        call: StreamCall = self._method(metadata=metadata)
        try:
            hello = training_pb2.Hello(
                protocol=PROTOCOL,
                run=self._run,
                acked_seq=self._ledger.received_seq,
                client_id=self._transport.client_id,
            )
            async with asyncio.timeout(WELCOME_SECONDS):
                await call.write(Frame(hello=hello).SerializeToString())
                first = await call.read()
            if first is grpc.aio.EOF or first.WhichOneof("frame") != "welcome":
                await _raise_status(call)
            self._welcomed_at = asyncio.get_running_loop().time()
            self._ledger.connect(first.welcome)
            self._max_frame_bytes = min(first.welcome.max_frame_bytes or MAX_FRAME_BYTES, MAX_FRAME_BYTES)
            self._draining = False
            backoff.reset()
            self._transport.mark_reached()
            await self._exchange(call)
            return self._closing
        except TimeoutError:
            raise UnavailableError(f"the service sent no Welcome within {WELCOME_SECONDS:.0f} s") from None
        finally:
            call.cancel()

    async def _exchange(self, call: StreamCall) -> None:
        """Reads and writes at the same time until the reader has seen the end."""
        reader = asyncio.create_task(self._read(call))
        writer = asyncio.create_task(self._write(call))
        try:
            await asyncio.wait((reader, writer), return_when=asyncio.FIRST_COMPLETED)
            # A write fails when the call has ended; why, the reader says.
            if writer.done() and not isinstance(writer.exception(), (grpc.aio.AioRpcError, asyncio.InvalidStateError)):
                writer.result()
            await reader
        finally:
            for task in (reader, writer):
                task.cancel()
            await asyncio.gather(reader, writer, return_exceptions=True)

    async def _write(self, call: StreamCall) -> None:
        """Writes operations as the credit allows, acknowledgements, and at last Goodbye."""
        self._wake.set()
        while True:
            timeout = ACK_AFTER_SECONDS if self._ledger.num_unacked else None
            # Not wait_for: in Python 3.11 it swallows a cancellation that comes together with what it waits for.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    await self._wake.wait()
            ack_is_due = not self._wake.is_set() or self._ledger.num_unacked >= ACK_EVERY_RESULTS or self._closing
            self._wake.clear()
            while not self._draining and (kept := self._ledger.take_sendable()) is not None:
                for frame in frames_of(kept, self._max_frame_bytes):
                    await call.write(frame)
            if ack_is_due and self._ledger.num_unacked:
                ack = training_pb2.Ack(acked_seq=self._ledger.acknowledge())
                await call.write(Frame(ack=ack).SerializeToString())
            if self._closing:
                goodbye = training_pb2.Goodbye(last_seq=self._ledger.received_seq)
                await call.write(Frame(goodbye=goodbye).SerializeToString())
                await call.done_writing()
                return

    async def _read(self, call: StreamCall) -> None:
        """Reads frames until the server ends the stream or has drained."""
        loop = asyncio.get_running_loop()
        drained_at: float | None = None
        while drained_at is None or self._ledger.num_in_flight:
            try:
                async with asyncio.timeout_at(drained_at):
                    response = await call.read()
            except TimeoutError:
                return
            if response is grpc.aio.EOF:
                if not self._closing:
                    await _raise_status(call)
                return
            frame = response.WhichOneof("frame")
            if frame == "result":
                self._on_result(response.result)
            elif frame == "credit":
                self._ledger.set_credit(response.credit)
            elif frame == "drain":
                self._draining = True
                drained_at = loop.time() + response.drain.grace.ToTimedelta().total_seconds()
            elif frame == "goodbye":
                return
            self._wake.set()

    def _on_result(self, result: training_pb2.OperationResult) -> None:
        kept = self._ledger.receive(result.seq)
        if kept is None:
            return
        self._unreserve(kept.operation.num_bytes)
        submission = self._by_seq.pop(kept.seq)
        submission.collected.append(result)
        spans.note_operation(self._run, kept.seq, submission.submitted, submission.caller, result.error.reason or "OK")
        self._progress.set()
        if len(submission.collected) < len(submission.operations or ()):
            return
        failed = next((part for part in submission.collected if part.HasField("error")), None)
        if failed is None:
            submission.results.set_result(submission.collected)
        else:
            submission.results.set_exception(from_operation_error(failed.error))

    def _on_task_done(self, task: "asyncio.Task[None]") -> None:
        # A fault of this module must not leave callers waiting for ever.
        fault = None if task.cancelled() else task.exception()
        if fault is not None:
            _log.error("the stream of %s ended by a fault of the client", self._run, exc_info=fault)
            self._fail(UnavailableError(f"the client's stream ended by a fault: {fault!r}", "INTERNAL"))

    def _fail(self, failure: TreadleError) -> None:
        """Ends the stream for good: everything outstanding and everything submitted later fails."""
        with self._backlog:
            if self._failure is not None:
                return
            self._failure = failure
            self._backlog.notify_all()
        for submission in [*dict.fromkeys(self._by_seq.values()), *self._waiting]:
            submission.results.set_exception(_copy_of(failure))
        self._by_seq.clear()
        self._waiting.clear()
        self._progress.set()


def _copy_of(error: TreadleError) -> TreadleError:
    # Each waiter raises its own instance: tracebacks of several threads must not mix.
    return type(error)(error.message, error.reason, error.retry_after_seconds)


async def _raise_status(call: StreamCall) -> None:
    """Raises the status with which the call ended; a clean end without Goodbye counts as a lost connection."""
    code = await call.code()
    if code is grpc.StatusCode.OK:
        raise UnavailableError("the service ended the stream without Goodbye")
    raise grpc.aio.AioRpcError(
        code, await call.initial_metadata(), await call.trailing_metadata(), await call.details(), None
    )
