"""One operation stream: Hello, then operations in and results out, until Goodbye or the connection is lost.

Reading and writing are two tasks. A client that vanishes looks like one that has nothing more to send: in either
case its operations run on, and their results wait for its next stream. Knows the run as a Resident; it does not know
how runs are executed or recovered.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Final

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError

from treadle.errors import LimitError, TreadleError, make_error
from treadle.v1 import training_pb2
from treadle_service import failpoints
from treadle_trainer.resident import Resident

PROTOCOL: Final = 1
MAX_FRAME_BYTES: Final = 2**20
MAX_OPERATION_BYTES: Final = 32 * 2**20
# A fragment of MAX_FRAME_BYTES has a few bytes around it.
_FRAME_SLACK_BYTES: Final = 1024
PATIENCE_SECONDS: Final = 5.0
"""How long a stream that is over its tenant's budget is not read, before it is ended with RATE_LIMITED."""

Request = training_pb2.StreamOperationsRequest
Response = training_pb2.StreamOperationsResponse


class Fragments:
    """Puts operations together that came in parts; believes nothing that it has not counted."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._total = 0

    @property
    def open(self) -> bool:
        """Whether an operation is under way."""
        return self._total > 0

    def add(self, fragment: training_pb2.OperationFragment) -> training_pb2.Operation | None:
        """Takes a part; returns the operation with the last. FRAME_SIZE_MISMATCH, OPERATION_TOO_LARGE, BAD_FRAME."""
        total, data = fragment.total_bytes, fragment.data
        if total > MAX_OPERATION_BYTES:
            raise make_error(
                "OPERATION_TOO_LARGE",
                f"an operation of {total} bytes is too long, at most {MAX_OPERATION_BYTES}: cut it by rows",
            )
        if not self._total:
            self._total = total
        have = len(self._data)
        if total != self._total or fragment.offset != have or not data or have + len(data) > total:
            raise make_error(
                "FRAME_SIZE_MISMATCH",
                f"a part of {len(data)} bytes at {fragment.offset} of {total} does not follow {have} of {self._total}",
            )
        self._data += data
        if len(self._data) < total:
            return None
        whole, self._data, self._total = bytes(self._data), bytearray(), 0
        try:
            return training_pb2.Operation.FromString(whole)
        except DecodeError as error:
            raise make_error("BAD_FRAME", "the parts do not make an Operation") from error


class OperationStream:
    """One client's stream on one run."""

    def __init__(self, resident: Resident, acked_seq: int) -> None:
        self._resident = resident
        self._fragments = Fragments()
        self._cursor = max(acked_seq, resident.results.acked_seq)
        # Results that were there before this stream are repeats to its client.
        self._replayed_seq = resident.results.shown_seq
        self._goodbye = False
        self._drain_sent = False

    async def run(self, requests: AsyncIterator[Request], grace_seconds: float) -> AsyncIterator[Response]:
        """Yields the server's frames; ends after Goodbye, or raises TreadleError."""
        resident = self._resident
        resident.num_streams += 1
        reading = asyncio.create_task(self._read(requests))
        reading.add_done_callback(lambda _: resident.announce())
        credit = resident.credit()
        try:
            failpoints.reach("trainer.welcome")
            yield Response(welcome=self._welcome(credit))
            while True:
                changed = resident.changed()
                if resident.draining and not self._drain_sent:
                    self._drain_sent = True
                    grace = Duration()
                    grace.FromNanoseconds(int(grace_seconds * 1e9))
                    yield Response(drain=training_pb2.Drain(grace=grace))
                async for response in self._results():
                    yield response
                if resident.credit() != credit:
                    credit = resident.credit()
                    yield Response(credit=credit)
                if reading.done():
                    limited = _rate_limit(reading)
                    all_sent = self._cursor + 1 >= resident.order.next_seq
                    # Who must wait gets what was accepted first: afterwards there is nobody to give it to.
                    if limited is not None and all_sent:
                        raise limited
                    if limited is None and (self._goodbye or all_sent):
                        yield Response(goodbye=training_pb2.Goodbye(last_seq=self._cursor))
                        return
                if resident.closed is not None:
                    raise resident.closed
                await changed.wait()
        finally:
            resident.num_streams -= 1
            reading.cancel()
            # Its outcome was looked at above, or nobody is left to hear of it.
            await asyncio.gather(reading, return_exceptions=True)

    def _welcome(self, credit: training_pb2.Credit) -> training_pb2.Welcome:
        resident = self._resident
        return training_pb2.Welcome(
            next_seq=resident.order.next_seq,
            last_done_seq=resident.results.shown_seq,
            credit=credit,
            max_frame_bytes=MAX_FRAME_BYTES,
            epoch=resident.facts.epoch,
            max_context=resident.facts.max_context,
        )

    async def _results(self) -> AsyncIterator[Response]:
        """Yields results that may be shown and have not been sent on this stream."""
        while self._cursor < self._resident.results.shown_seq:
            self._cursor += 1
            result = self._resident.result(self._cursor, replayed=self._cursor <= self._replayed_seq)
            if result is not None:
                failpoints.reach("trainer.result")
                yield Response(result=result)

    async def _accept(self, operation: training_pb2.Operation) -> None:
        """Takes an operation; one that is over its tenant's budget by a moment waits, and with it all behind it."""
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + PATIENCE_SECONDS
        # What crosses with Drain is left to its client, which keeps it and sends it on its next stream.
        while not self._resident.draining:
            try:
                self._resident.accept(operation)
            except LimitError as error:
                wait = error.retry_after_seconds or PATIENCE_SECONDS
                if error.reason != "RATE_LIMITED" or loop.time() + wait > give_up_at:
                    raise
            else:
                return
            await asyncio.sleep(wait)

    async def _read(self, requests: AsyncIterator[Request]) -> None:
        async for request in requests:
            if request.ByteSize() > MAX_FRAME_BYTES + _FRAME_SLACK_BYTES:
                raise make_error(
                    "FRAME_TOO_LARGE",
                    f"a frame has {request.ByteSize()} bytes, at most {MAX_FRAME_BYTES}: send it in fragments",
                )
            frame = request.WhichOneof("frame")
            if frame == "operation":
                if self._fragments.open:
                    raise make_error("FRAME_SIZE_MISMATCH", "an operation came between the parts of another")
                await self._accept(request.operation)
            elif frame == "fragment":
                operation = self._fragments.add(request.fragment)
                if operation is not None:
                    await self._accept(operation)
            elif frame == "ack":
                self._resident.acknowledge(request.ack.acked_seq)
            elif frame == "goodbye":
                self._goodbye = True
                return
            else:
                raise make_error("BAD_FRAME", "after Hello come operations, fragments, acks and Goodbye")


def _rate_limit(reading: asyncio.Task[None]) -> LimitError | None:
    """Returns why a finished reader must wait; raises any other error that ended it."""
    error = reading.exception()
    if isinstance(error, LimitError) and error.reason == "RATE_LIMITED":
        return error
    reading.result()
    return None


async def read_hello(requests: AsyncIterator[Request]) -> training_pb2.Hello:
    """Returns the first frame; BAD_FRAME if it is no Hello of this protocol."""
    async for request in requests:
        if not request.HasField("hello"):
            break
        if request.hello.protocol != PROTOCOL:
            raise make_error("BAD_FRAME", f"this server speaks protocol {PROTOCOL}, not {request.hello.protocol}")
        return request.hello
    raise make_error("BAD_FRAME", "a stream begins with Hello")


def as_unary(error: TreadleError) -> TreadleError:
    """Returns an error of the order as a single call should see it: a full window is a queue that will drain."""
    if error.reason != "CREDIT_EXCEEDED":
        return error
    return make_error("QUEUE_FULL", error.message, 0.5)
