"""Chunks of other trainers' runs, computed here: taken in from a stream, queued like everybody's, and sent back.

A guest's chunks take their tenant's turn in the passes, beside those of the runs that are held here. There are few at a
time, and none while a pass's worth of own work waits: whoever is refused computes them at home. Nothing of a guest
outlives its stream. Knows nothing of the operations that the chunks are of.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from itertools import count
from typing import Final

from treadle import names
from treadle.errors import TreadleError, make_error
from treadle.internal.v1 import trainer_pb2
from treadle_engine.batch import TokenBatch
from treadle_engine.lora import LoraConfig
from treadle_engine.losses import LossSpec
from treadle_engine.passes import ChunkResult
from treadle_service import failpoints
from treadle_service.logs import get_logger
from treadle_trainer import chunk_wire, counters
from treadle_trainer.device import Device, PassChunk
from treadle_trainer.device_loop import DeviceLoop, PassPart
from treadle_trainer.executor import Executor
from treadle_trainer.operations import lora_config
from treadle_trainer.scheduler import RunQueue, Waiting

MOST_CHUNKS: Final = 16
"""Chunks of all guests that may wait, run or be on their way back."""
log = get_logger(__name__)
Response = trainer_pb2.ComputeChunksResponse


@dataclass(eq=False)
class GuestChunk:
    """One chunk of a guest, as a part of a pass."""

    guest: Guest
    key: str
    chunk_id: int
    seq: int
    batch: TokenBatch
    loss: LossSpec
    forward_only: bool

    @property
    def run(self) -> str:
        """The run that it is of."""
        return self.guest.run

    def as_chunk(self) -> PassChunk:
        """Returns the chunk as the device takes it."""
        return PassChunk(self.key, self.batch, self.loss, self.forward_only, apart=True)

    def begin(self, now: float) -> None:
        """Says that the chunk is in a pass."""
        self.guest.begun(self)

    def end(self, result: ChunkResult | None, fault: TreadleError | None, seconds: float) -> None:
        """Sends what came out. An error is not: whoever holds the run finds out for itself."""
        error = fault if result is None else result.error
        self.guest.ended(self, None if error is not None else result, error.reason if error else "", seconds)


class Guests:
    """Everybody whose chunks are computed here."""

    def __init__(self, executor: Executor, loop: DeviceLoop, device: Device, most_bytes: int) -> None:
        """Adds the guests' queues to the device loop's; their weights take `most_bytes` at most, so do gradients.

        Of the device its immutable facts are read.
        """
        self.executor, self.loop, self.budget, self.limits = executor, loop, device.budget, device.info
        self._num_bytes, self._most_bytes = device.num_bytes, most_bytes
        self._guests: set[Guest] = set()
        self._numbers = count(1)
        self._numerics = ""
        self.num_chunks = 0
        self.draining = False
        loop.guests = self.queues

    @property
    def num_guests(self) -> int:
        """Runs of other trainers whose weights are or will be here."""
        return len(self._guests)

    async def numerics(self) -> str:
        """Returns how this trainer computes; found out at the first call, which waits for the pass under way."""
        self._numerics = self._numerics or await self.executor.call(Device.numerics)
        return self._numerics

    def queues(self) -> list[RunQueue[PassPart]]:
        """Returns the chunks that wait, by guest."""
        return [guest.queue() for guest in self._guests if guest.waiting]

    def refusal(self, num_tokens: int, gradient_bytes: int) -> str:
        """Returns why a chunk of so many positions cannot be taken in now, empty if it can."""
        if self.draining:
            return "DRAINING"
        if num_tokens > self.budget.max_tokens:
            return "SEQUENCE_TOO_LONG"
        full = self.num_chunks >= MOST_CHUNKS or (self.num_chunks + 1) * gradient_bytes > self._most_bytes
        busy = self.loop.own_waiting_tokens >= self.budget.max_tokens
        return "QUEUE_FULL" if full or busy else ""

    async def serve(self, requests: AsyncIterator[trainer_pb2.ComputeChunksRequest]) -> AsyncIterator[Response]:
        """Answers one stream; NO_WORKER for a run of another base, QUEUE_FULL when there is no room for its weights."""
        first = await anext(requests, None)
        if first is None or not first.HasField("hello"):
            raise make_error("BAD_FRAME", "the first frame must be a hello")
        hello = first.hello
        if hello.base != self.limits.name:
            raise make_error(
                "NO_WORKER", f"{hello.run} is on base {hello.base!r}; this trainer holds {self.limits.name!r}"
            )
        guest = self._admit(hello)
        reader: asyncio.Task[None] | None = None
        try:
            yield Response(welcome=trainer_pb2.LendWelcome(numerics=await self.numerics()))
            reader = asyncio.create_task(guest.read(requests))
            async for response in guest.responses():
                yield response
            await reader
        finally:
            if reader is not None:
                reader.cancel()
            self._guests.discard(guest)
            guest.leave()

    def _admit(self, hello: trainer_pb2.LendHello) -> Guest:
        config = lora_config(hello.lora)
        # A state is weights and two moments of their size.
        num_bytes = self._num_bytes(config) // 3
        if num_bytes + sum(guest.num_bytes for guest in self._guests) > self._most_bytes:
            raise make_error("QUEUE_FULL", "there is no room for the weights of another run")
        guest = Guest(self, hello, config, num_bytes, f"{hello.run}@{next(self._numbers)}")
        self._guests.add(guest)
        return guest


class Guest:
    """One stream's run: its weights, its chunks, and what is to be sent back."""

    def __init__(
        self, guests: Guests, hello: trainer_pb2.LendHello, config: LoraConfig, num_bytes: int, name: str
    ) -> None:
        """`name` tells it from any other guest; its weights take `num_bytes`."""
        self.run, self.tenant = hello.run, names.parse_run(hello.run).tenant
        self.config, self.num_bytes = config, num_bytes
        self.waiting: deque[GuestChunk] = deque()
        self._guests, self._name = guests, name
        self._key = ""
        self._versions = count(1)
        self._gone = False
        self._notes: deque[Response] = deque()
        self._answers: deque[tuple[GuestChunk, ChunkResult, float]] = deque()
        self._over = False
        self._changed = asyncio.Event()

    def queue(self) -> RunQueue[PassPart]:
        """Returns the chunks that wait, for the scheduler."""
        seconds = self._guests.budget.seconds
        chunks: list[Waiting[PassPart]] = [
            Waiting(chunk.batch.num_tokens, chunk, seconds(chunk.batch.lengths_R)) for chunk in self.waiting
        ]
        return RunQueue(self._name, self.tenant, chunks)

    async def read(self, requests: AsyncIterator[trainer_pb2.ComputeChunksRequest]) -> None:
        """Takes weights and chunks until the stream ends."""
        announced = trainer_pb2.LendWeights()
        weights = chunk_wire.Gathering(0, 0)
        try:
            async for request in requests:
                kind = request.WhichOneof("frame")
                if kind == "weights":
                    announced = request.weights
                    weights = chunk_wire.Gathering(announced.num_bytes, self.num_bytes)
                    self._forget()
                elif kind == "piece":
                    weights.add(request.piece)
                    if weights.complete:
                        await self._take_weights(weights.data, announced.digest)
                elif kind == "chunk":
                    self._take_chunk(request.chunk)
                elif kind == "take_back":
                    self._drop(request.take_back.id)
                else:
                    raise make_error("BAD_FRAME", f"a frame of kind {kind!r} does not belong here")
        finally:
            self._over = True
            self._changed.set()

    async def responses(self) -> AsyncIterator[Response]:
        """Yields what is to be sent, until the stream is over."""
        while not self._over:
            await self._changed.wait()
            self._changed.clear()
            while self._notes or self._answers:
                if self._notes:
                    yield self._notes.popleft()
                    continue
                chunk, result, seconds = self._answers.popleft()
                try:
                    async for response in self._answer(chunk, result, seconds):
                        yield response
                finally:
                    self._guests.num_chunks -= 1
                counters.GUEST_CHUNKS.labels("computed").inc()

    def begun(self, chunk: GuestChunk) -> None:
        """Notes that a chunk is in a pass."""
        self.waiting.remove(chunk)
        self._note(Response(begun=trainer_pb2.ChunkBegun(id=chunk.chunk_id)))

    def ended(self, chunk: GuestChunk, result: ChunkResult | None, reason: str, seconds: float) -> None:
        """Takes what came out of a pass."""
        if self._gone or result is None:
            self._guests.num_chunks -= 1
            if not self._gone:
                self._refuse(chunk.chunk_id, reason)
            return
        failpoints.reach("trainer.lent")
        self._answers.append((chunk, result, seconds))
        self._changed.set()

    def leave(self) -> None:
        """Lets go of everything; a chunk that is in a pass is dropped when that ends."""
        self._gone = True
        self._forget()
        self._guests.num_chunks -= len(self._answers)
        self._answers.clear()

    async def _answer(self, chunk: GuestChunk, result: ChunkResult, seconds: float) -> AsyncIterator[Response]:
        yield Response(computed=chunk_wire.encode_result(chunk.chunk_id, result, seconds))
        if result.gradient is None:
            return
        for piece in chunk_wire.pieces(result.gradient.data):
            # Who waits for a begun chunk must not wait for this transfer too.
            while self._notes:
                yield self._notes.popleft()
            yield Response(piece=piece)
            failpoints.reach("trainer.lent_piece")

    async def _take_weights(self, data: bytearray, digest: bytes) -> None:
        key = f"{self._name}.{next(self._versions)}"
        await self._guests.executor.beside(Device.welcome, key, self.config, data, digest)
        if self._gone:
            self._dismiss(key)
        else:
            self._key = key

    def _take_chunk(self, message: trainer_pb2.LentChunk) -> None:
        batch, loss = chunk_wire.decode_chunk(message, self._guests.limits)
        if not self._key:
            raise make_error("BAD_FRAME", "a chunk came before the weights")
        reason = self._guests.refusal(batch.num_tokens, self.num_bytes)
        if reason:
            self._refuse(message.id, reason)
            return
        self._guests.num_chunks += 1
        self.waiting.append(GuestChunk(self, self._key, message.id, message.seq, batch, loss, message.forward_only))
        self._guests.loop.wake()

    def _drop(self, chunk_id: int) -> None:
        """Drops a chunk that has not begun; the answer to one that has is ignored where it arrives."""
        for chunk in [chunk for chunk in self.waiting if chunk.chunk_id == chunk_id]:
            self.waiting.remove(chunk)
            self._guests.num_chunks -= 1
            counters.GUEST_CHUNKS.labels("taken_back").inc()

    def _forget(self) -> None:
        """Drops the weights and what waits for them."""
        self._guests.num_chunks -= len(self.waiting)
        self.waiting.clear()
        if self._key:
            self._dismiss(self._key)
        self._key = ""

    def _dismiss(self, key: str) -> None:
        # Behind the passes that were begun with them.
        self._guests.executor.call(Device.dismiss, key)

    def _refuse(self, chunk_id: int, reason: str) -> None:
        counters.GUEST_CHUNKS.labels("refused").inc()
        self._note(Response(refused=trainer_pb2.ChunkRefused(id=chunk_id, reason=reason)))

    def _note(self, response: Response) -> None:
        self._notes.append(response)
        self._changed.set()
