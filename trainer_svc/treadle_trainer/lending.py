"""One stream to a trainer that helps: weights go out once, chunks follow, outputs and gradients come back.

Whatever happens to the stream, each chunk that was lent is given back exactly once: computed, or to be computed at
home. Knows neither which chunks ought to be lent nor what becomes of what they gave.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Final, Protocol

import grpc

from treadle.errors import TreadleError, from_rpc_error, make_error
from treadle.internal.v1 import trainer_pb2, trainer_pb2_grpc
from treadle_engine.batch import TokenBatch
from treadle_engine.passes import ChunkResult
from treadle_service import failpoints
from treadle_service.channels import Metadata
from treadle_service.logs import get_logger
from treadle_trainer import chunk_wire, counters
from treadle_trainer.operations import PassWork
from treadle_trainer.resident import RunOp

DEPTH: Final = 2
"""Chunks that a helper has at a time: one that it computes, and one so that it need not wait for the wire."""
PAUSE_SECONDS: Final = 0.5
"""How long a helper that refused a chunk is left alone."""
MOST_LATE: Final = 2
"""Chunks in vain waited for, after which a stream is given up."""
log = get_logger(__name__)
Request = trainer_pb2.ComputeChunksRequest


@dataclass(eq=False, slots=True)
class Loan:
    """A chunk that is elsewhere."""

    op: RunOp
    work: PassWork
    index: int
    lent_at: float = field(default_factory=time.monotonic)
    begun: bool = False
    timer: asyncio.TimerHandle | None = None

    @property
    def batch(self) -> TokenBatch:
        """Its content."""
        return self.work.chunks[self.index]


class Borrower(Protocol):
    """Whose chunks are lent."""

    def ready(self, link: Link) -> None:
        """Hears that a helper can take chunks (again)."""

    def returned(self, loan: Loan, result: ChunkResult, seconds: float) -> None:
        """Takes what a chunk gave, and the time that it took on the helper's device."""

    def given_back(self, loan: Loan, reason: str) -> None:
        """Takes a chunk that must be computed at home, for a reason of the catalogue or that of a link."""

    def unlike(self, link: Link, numerics: str) -> None:
        """Hears that a helper computes otherwise."""


@dataclass(frozen=True, slots=True)
class Weights:
    """A run's weights as frames, made once for all helpers, and how they are computed with at home."""

    frames: Sequence[Request]
    num_bytes: int
    numerics: str

    @classmethod
    def cut(cls, data: bytes, digest: bytes, numerics: str) -> Weights:
        """Cuts a flat buffer."""
        head = Request(weights=trainer_pb2.LendWeights(num_bytes=len(data), digest=digest))
        parts = [Request(piece=piece) for piece in chunk_wire.pieces(memoryview(data))]
        return cls([head, *parts], len(data), numerics)


class Link:
    """The stream to one helper, for one run."""

    def __init__(
        self,
        worker: str,
        stub: trainer_pb2_grpc.TrainerServiceAsyncStub,
        metadata: Metadata,
        hello: trainer_pb2.LendHello,
        weights: Weights,
        borrower: Borrower,
    ) -> None:
        """Prepares the stream; `run` opens it."""
        self.worker, self.usable, self.closed = worker, False, False
        self.failure: TreadleError | None = None
        """Why the stream ended, if not because it was told to."""
        self._stub, self._metadata, self._hello, self._weights = stub, metadata, hello, weights
        self._borrower = borrower
        self._loans: dict[int, Loan] = {}
        self._ids = count(1)
        self._num_late = 0
        self._paused_until = 0.0
        self._computed: trainer_pb2.ChunkComputed | None = None
        self._gradient: chunk_wire.Gathering | None = None
        self._out: asyncio.Queue[Request] = asyncio.Queue()

    @property
    def has_room(self) -> bool:
        """Whether a chunk may be lent now."""
        return self.usable and not self.closed and len(self._loans) < DEPTH and time.monotonic() >= self._paused_until

    def loans(self) -> list[Loan]:
        """Returns what is lent over this link, oldest first."""
        return list(self._loans.values())

    def lend(self, loan: Loan, patience: float) -> None:
        """Sends a chunk; it is given back after so many seconds at the latest."""
        failpoints.reach("trainer.lend")
        number = next(self._ids)
        self._loans[number] = loan
        loan.timer = asyncio.get_running_loop().call_later(patience, self._late, number)
        chunk = chunk_wire.encode_chunk(
            number, loan.op.seq, loan.batch, loan.work.loss, forward_only=loan.work.forward_only
        )
        counters.FAN_OUT_BYTES.labels("chunks").inc(chunk.ByteSize())
        self._out.put_nowait(Request(chunk=chunk))

    def take_back(self, loan: Loan, reason: str) -> None:
        """Gives a chunk back at once; what the helper still sends of it is ignored."""
        number = next((number for number, lent in self._loans.items() if lent is loan), 0)
        if number:
            self._out.put_nowait(Request(take_back=trainer_pb2.TakeBack(id=number)))
            self._give_back(number, reason)

    async def run(self) -> None:
        """Opens the stream and works it until it ends or the task is cancelled."""
        call = self._stub.ComputeChunks(self._requests(), metadata=self._metadata)
        try:
            async for response in call:
                self._take(response)
        except grpc.aio.AioRpcError as error:
            self.failure = from_rpc_error(error)
        except TreadleError as error:
            self.failure = error
        finally:
            self.closed = True
            call.cancel()
            for number in list(self._loans):
                self._give_back(number, "WORKER_LOST")

    async def _requests(self) -> AsyncIterator[Request]:
        yield Request(hello=self._hello)
        while True:
            yield await self._out.get()

    def _take(self, response: trainer_pb2.ComputeChunksResponse) -> None:
        kind = response.WhichOneof("frame")
        if kind == "welcome":
            self._welcome(response.welcome.numerics)
        elif kind == "begun" and response.begun.id in self._loans:
            self._loans[response.begun.id].begun = True
        elif kind == "refused":
            self._paused_until = time.monotonic() + PAUSE_SECONDS
            asyncio.get_running_loop().call_later(PAUSE_SECONDS, self._borrower.ready, self)
            self._give_back(response.refused.id, response.refused.reason)
        elif kind == "computed":
            self._computed = response.computed
            most = self._weights.num_bytes
            self._gradient = None
            if response.computed.gradient_bytes:
                self._gradient = chunk_wire.Gathering(response.computed.gradient_bytes, most)
            else:
                self._finish()
        elif kind == "piece" and self._gradient is not None:
            counters.FAN_OUT_BYTES.labels("gradients").inc(len(response.piece.data))
            self._gradient.add(response.piece)
            if self._gradient.complete:
                self._finish()

    def _welcome(self, numerics: str) -> None:
        if numerics != self._weights.numerics:
            self._borrower.unlike(self, numerics)
            return
        counters.FAN_OUT_BYTES.labels("weights").inc(self._weights.num_bytes)
        for frame in self._weights.frames:
            self._out.put_nowait(frame)
        self.usable = True
        self._borrower.ready(self)

    def _finish(self) -> None:
        computed, gathered = self._computed, self._gradient
        self._computed, self._gradient = None, None
        loan = self._loans.get(computed.id) if computed is not None else None
        if computed is None or loan is None:
            counters.LENT_CHUNKS.labels("IN_VAIN").inc()
            return
        gradient = None if gathered is None else gathered.data
        if len(gradient or b"") != (0 if loan.work.forward_only else self._weights.num_bytes):
            raise make_error("BAD_FRAME", "the gradient has not the length of the weights")
        result = chunk_wire.decode_result(computed, loan.batch, gradient)
        del self._loans[computed.id]
        if loan.timer is not None:
            loan.timer.cancel()
        self._borrower.returned(loan, result, computed.device.ToNanoseconds() / 1e9)
        self._borrower.ready(self)

    def _late(self, number: int) -> None:
        loan = self._loans.get(number)
        if loan is None:
            return
        self.take_back(loan, "DEADLINE_EXCEEDED")
        self._num_late += 1
        if self._num_late >= MOST_LATE:
            log.warning("helper_slow", worker=self.worker, run=self._hello.run)
            self.usable = False

    def _give_back(self, number: int, reason: str) -> None:
        loan = self._loans.pop(number, None)
        if loan is not None:
            if loan.timer is not None:
                loan.timer.cancel()
            self._borrower.given_back(loan, reason)
