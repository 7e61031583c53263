"""One user's big batch over several trainers: which chunks are lent to whom, and how their gradients come together.

The trainer that holds a run stays the only one that knows its order, journal and optimizer. When a batch would keep it
for many passes, trainers of the same base that compute alike help it with single chunks; what these gave is added in
the order of the chunks, each once, so that every bit is that of computing all of them here. A helper that refuses, is
slow or dies costs time: the chunk is computed here. Nothing of this is in the journal.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

import numpy as np

from treadle.errors import TreadleError, make_error
from treadle.internal.v1 import trainer_pb2
from treadle.v1 import admin_pb2
from treadle_engine.errors import EngineError
from treadle_engine.passes import ChunkResult
from treadle_service import failpoints
from treadle_service.logs import get_logger
from treadle_trainer import chunk_wire, counters, operations
from treadle_trainer.budget import PassBudget
from treadle_trainer.device import Device
from treadle_trainer.device_loop import DeviceLoop, PickedChunk
from treadle_trainer.executor import Executor
from treadle_trainer.journal_client import JournalClient
from treadle_trainer.lending import Link, Loan, Weights
from treadle_trainer.neighbors import Neighbors
from treadle_trainer.resident import Place, Resident, RunOp
from treadle_trainer.settings import TrainerSettings

MOST_HELPERS: Final = 8
"""Of one batch: the weights go to each of them."""
LEAST_WINDOW: Final = 4
"""Chunks of a batch whose gradients must have room, or it is not worth the while."""
LOOK_SECONDS: Final = 3.0
"""How often the list of trainers is read while batches are large."""
AVOID_SECONDS: Final = 5.0
"""How long a trainer whose stream broke is not asked again."""
UNLIKE_SECONDS: Final = 600.0
"""How long one that computes otherwise is not."""
GRACE_SECONDS: Final = 0.1
"""How long after it was lent a chunk that has not begun stays lent although this trainer has nothing else to do."""
PATIENCE_SECONDS: Final = 5.0
PATIENCE_FACTOR: Final = 8.0
"""A lent chunk is waited for so long, and so many times as long as it takes here."""
MOVED_BYTES_PER_SECOND: Final = 300e6
"""What one processor takes in, checks and adds of gradients (`bench fanout`: 20 MB in 50 ms, loopback), and a margin.

A chunk that is computed in less time than its gradient takes by this is kept.
"""
log = get_logger(__name__)


@dataclass(slots=True)
class Peer:
    """Another trainer of the base, and until when it is not asked."""

    worker: str
    address: str
    load: float = 0.0
    avoid_until: float = 0.0


class FanOut:
    """Decides which runs are helped, and by whom; `run_forever` must be running."""

    def __init__(
        self,
        settings: TrainerSettings,
        executor: Executor,
        store: JournalClient,
        neighbors: Neighbors,
        loop: DeviceLoop,
        budget: PassBudget,
        base: str,
        numerics: Callable[[], Awaitable[str]],
    ) -> None:
        """Registers itself with the device loop; `numerics` says how this trainer computes."""
        self.numerics = numerics
        self.settings, self.executor, self.loop, self.budget = settings, executor, loop, budget
        self.neighbors = neighbors
        self._store, self._base = store, base
        self._peers: dict[str, Peer] = {}
        self._batches: dict[str, BigBatch] = {}
        self._wanted = asyncio.Event()
        loop.lender = self

    @property
    def num_batches(self) -> int:
        """Batches that are being helped with."""
        return len(self._batches)

    def local(self, resident: Resident, picks: list[PickedChunk]) -> list[PickedChunk]:
        """Returns which of a run's waiting chunks the next pass here may take, and how; may begin to lend others."""
        batch = self._batches.get(resident.name)
        if batch is None and self._large(resident, picks):
            self._wanted.set()
            peers = self._usable()
            if peers:
                batch = self._batches[resident.name] = BigBatch(self, resident)
                batch.start(peers)
        return picks if batch is None else batch.local(picks)

    def feed(self) -> None:
        """Lends what may be lent, and forgets batches that are through."""
        for name, batch in list(self._batches.items()):
            if batch.over:
                batch.close()
                del self._batches[name]
            else:
                batch.feed()

    def window(self, gradient_bytes: int) -> int:
        """Returns how many chunks of a batch may be under way or waiting to be added."""
        return self.settings.fan_out_bytes // max(1, len(self._batches)) // max(1, gradient_bytes)

    async def run_forever(self) -> None:
        """Reads the list of trainers whenever a batch is large."""
        try:
            while True:
                await self._wanted.wait()
                self._wanted.clear()
                try:
                    await self._look()
                except TreadleError as error:
                    log.warning("trainers_unknown", reason=error.reason, message=error.message)
                self.loop.wake()
                await asyncio.sleep(LOOK_SECONDS)
        finally:
            for batch in self._batches.values():
                batch.close()

    async def _look(self) -> None:
        found: dict[str, Peer] = {}
        for entry in await self._store.scan_workers(admin_pb2.WORKER_KIND_TRAINER, self._base):
            worker = entry.worker
            if worker.worker == self.settings.worker or worker.draining:
                continue
            known = self._peers.get(worker.worker)
            avoid = known.avoid_until if known is not None and known.address == worker.address else 0.0
            found[worker.worker] = Peer(worker.worker, worker.address, worker.load, avoid)
        self._peers = found

    def _usable(self) -> list[Peer]:
        """Returns the trainers that may help, the idlest first."""
        now = time.monotonic()
        peers = [peer for peer in self._peers.values() if peer.avoid_until <= now]
        return sorted(peers, key=lambda peer: (peer.load, peer.worker))[:MOST_HELPERS]

    def _large(self, resident: Resident, picks: Sequence[PickedChunk]) -> bool:
        """Tells whether so many chunks wait that others had better help."""
        if self.settings.fan_out == "off" or len(picks) < self.settings.fan_out_chunks or resident.draining:
            return False
        gradient_bytes = resident.state_bytes // 3
        if self.window(gradient_bytes) < LEAST_WINDOW:
            return False
        seconds = self.loop.pace * sum(self.budget.seconds(pick.batch.lengths_R) for pick in picks)
        if not seconds:
            return True
        worth = seconds / len(picks) > gradient_bytes / MOVED_BYTES_PER_SECOND
        return worth and seconds > 2 * self.budget.target_seconds


class BigBatch:
    """The consecutive passes' work of one run while it is helped: what is where, until all of it is added."""

    def __init__(self, fan_out: FanOut, resident: Resident) -> None:
        """Nothing is lent before `start`."""
        self._fan_out, self._resident = fan_out, resident
        self._links: dict[Link, asyncio.Task[None]] = {}
        self._peers: dict[Link, Peer] = {}
        self._starting: asyncio.Task[None] | None = None
        self._adding = False
        self._slowest_seconds = 0.0
        self._closed = False

    @property
    def over(self) -> bool:
        """Whether the run has left, or nothing of it is under way and nobody could help with what waits."""
        if self._resident.closed is not None:
            return True
        if self._adding or any(work.taken or work.arrived for _, work in self._works()):
            return False
        waits = any(next(work.waiting, None) is not None for _, work in self._works())
        helped = self._starting is not None or any(not link.closed for link in self._links)
        return not (waits and helped)

    def start(self, peers: Sequence[Peer]) -> None:
        """Begins to bring the weights to the helpers."""
        self._starting = asyncio.create_task(self._start(peers))

    def local(self, picks: list[PickedChunk]) -> list[PickedChunk]:
        """Returns the chunks that may be computed here, apart; if there is none, one that nobody has begun."""
        room = set(self._in_window())
        mine = [pick for pick in picks if (pick.op.seq, pick.index) in room]
        if not mine:
            mine = self._take_one_back()
        return [replace(pick, borrower=self) for pick in mine]

    def feed(self) -> None:
        """Lends chunks to the helpers that have room."""
        if self._resident.num_held or self._resident.draining:
            return
        for link in sorted(self._links, key=lambda link: len(link.loans())):
            while link.has_room and (loan := self._next()) is not None:
                loan.work.taken.add(loan.index)
                if loan.op.started_at is None:
                    loan.op.started_at = time.monotonic()
                link.lend(loan, self._patience(loan))
                asyncio.get_running_loop().call_later(2 * GRACE_SECONDS, self._fan_out.loop.wake)

    def close(self) -> None:
        """Ends the streams; what is lent comes back."""
        self._closed = True
        if self._starting is not None:
            self._starting.cancel()
        for task in self._links.values():
            task.cancel()

    # What the device loop says of chunks computed here.

    def begun(self, op: RunOp, work: operations.PassWork, index: int) -> None:
        """Notes that a chunk is in a pass here."""
        work.taken.add(index)

    def ended(
        self, op: RunOp, work: operations.PassWork, index: int, result: ChunkResult | None, fault: TreadleError | None
    ) -> None:
        """Takes what a pass here gave; a pass that failed as a whole fails the chunk."""
        if result is None:
            error = fault or make_error("INTERNAL", "the pass gave nothing")
            result = ChunkResult(_NOTHING, error=EngineError(error.reason, error.message))
        self._arrived(work, index, result)

    # What links say.

    def ready(self, link: Link) -> None:
        """Hears that a helper can take chunks."""
        self._fan_out.loop.wake()

    def returned(self, loan: Loan, result: ChunkResult, seconds: float) -> None:
        """Takes what a helper computed."""
        counters.LENT_CHUNKS.labels("OK").inc()
        loan.op.work.device_seconds += seconds
        self._slowest_seconds = max(self._slowest_seconds, seconds)
        self._arrived(loan.work, loan.index, result)

    def given_back(self, loan: Loan, reason: str) -> None:
        """Takes a chunk that is to be computed here."""
        counters.LENT_CHUNKS.labels(reason).inc()
        loan.work.taken.discard(loan.index)
        if reason not in _BUSY:
            # Whether it is the chunk's fault or the helper's is found out here.
            loan.work.kept.add(loan.index)
        self._fan_out.loop.wake()

    def unlike(self, link: Link, numerics: str) -> None:
        """Leaves a helper that computes otherwise alone."""
        counters.UNLIKE_TRAINERS.inc()
        log.warning("trainer_computes_otherwise", worker=link.worker, numerics=numerics)
        self._peers[link].avoid_until = time.monotonic() + UNLIKE_SECONDS
        self._links[link].cancel()

    async def _start(self, peers: Sequence[Peer]) -> None:
        facts = self._resident.facts
        try:
            weights = await self._weights()
            hello = trainer_pb2.LendHello(run=facts.name, epoch=facts.epoch, base=facts.base, lora=facts.lora)
            for peer in peers:
                self._open(peer, hello, weights)
            log.debug("fan_out", run=facts.name, helpers=[peer.worker for peer in peers])
        except TreadleError as error:
            log.warning("fan_out_failed", run=facts.name, reason=error.reason, message=error.message)
        finally:
            self._starting = None
            self._fan_out.loop.wake()

    async def _weights(self) -> Weights:
        fan_out = self._fan_out
        data, digest = await fan_out.executor.beside(Device.copy_weights, self._resident.name)
        return await asyncio.to_thread(Weights.cut, data, digest, await fan_out.numerics())

    def _open(self, peer: Peer, hello: trainer_pb2.LendHello, weights: Weights) -> None:
        neighbors = self._fan_out.neighbors
        link = Link(peer.worker, neighbors.stub(peer.address), neighbors.metadata, hello, weights, self)
        self._peers[link] = peer
        task = self._links[link] = asyncio.create_task(link.run())
        task.add_done_callback(partial(self._ended, link))

    def _ended(self, link: Link, task: asyncio.Task[None]) -> None:
        """Notes the end of a stream: one that broke, or that was refused, is not opened again at once."""
        if link.failure is not None:
            log.info("helper_lost", worker=link.worker, reason=link.failure.reason, message=link.failure.message)
        if not self._closed:
            self._peers[link].avoid_until = max(self._peers[link].avoid_until, time.monotonic() + AVOID_SECONDS)
        if not task.cancelled() and task.exception() is not None:
            log.error("link_fault", worker=link.worker, exc_info=task.exception())
        self._fan_out.loop.wake()

    def _works(self) -> Iterator[tuple[RunOp, operations.PassWork]]:
        """Yields the operations of the batch, in order."""
        for op in self._resident.order.runnable_batch():
            if op.work.prepared is None:
                return
            yield op, op.work.prepared

    def _in_window(self) -> Iterator[tuple[int, int]]:
        """Yields (seq, index) of the chunks whose gradients there is room for, in order."""
        left = max(1, self._fan_out.window(self._resident.state_bytes // 3))
        for op, work in self._works():
            for index in range(len(work.results), len(work.chunks)):
                if not left:
                    return
                left -= 1
                yield op.seq, index

    def _next(self) -> Loan | None:
        """Returns the first chunk that may be lent."""
        if self._resident.closed is not None or self._resident.place is not Place.DEVICE:
            return None
        room = set(self._in_window())
        for op, work in self._works():
            if self._resident.draining and op.started_at is None:
                return None
            for index in work.waiting:
                if (op.seq, index) not in room:
                    return None
                if index not in work.kept and chunk_wire.num_bytes(work.chunks[index]) <= chunk_wire.MOST_CHUNK_BYTES:
                    return Loan(op, work, index)
        return None

    def _take_one_back(self) -> list[PickedChunk]:
        """Takes back the first chunk that was lent a while ago and that no helper has begun."""
        now = time.monotonic()
        lent = [(loan.op.seq, loan.index, loan, link) for link in self._links for loan in link.loans()]
        for _, _, loan, link in sorted(lent, key=lambda entry: entry[:2]):
            if not loan.begun and now - loan.lent_at >= GRACE_SECONDS:
                link.take_back(loan, "NOT_BEGUN")
                return [PickedChunk(self._resident, loan.op, loan.work, loan.index)]
        return []

    def _patience(self, loan: Loan) -> float:
        expected = self._fan_out.loop.pace * self._fan_out.budget.seconds(loan.batch.lengths_R)
        return PATIENCE_SECONDS + PATIENCE_FACTOR * max(expected, self._slowest_seconds)

    def _arrived(self, work: operations.PassWork, index: int, result: ChunkResult) -> None:
        if work.deliver(index, result) and not self._adding:
            self._adding = True
            self._fan_out.loop.spawn(self._add())
        self._fan_out.loop.wake()

    async def _add(self) -> None:
        """Adds what has come, in order, until there is a gap; ends the operations that are complete, or have failed."""
        try:
            while self._resident.closed is None and (head := next(self._works(), None)) is not None:
                op, work = head
                ready = work.next_arrived()
                if not ready or not await self._add_ready(op, work, ready):
                    return
        finally:
            self._adding = False

    async def _add_ready(self, op: RunOp, work: operations.PassWork, ready: list[ChunkResult]) -> bool:
        gradients = [result.gradient for result in ready if result.gradient is not None]
        fault: TreadleError | None = None
        if gradients:
            failpoints.reach("trainer.add_lent")
            began = time.monotonic()
            try:
                await self._fan_out.executor.beside(Device.add_gradients, self._resident.name, gradients)
            except TreadleError as error:
                fault = error
            counters.ADD_SECONDS.inc(time.monotonic() - began)
            failpoints.reach("trainer.added_lent")
        if self._resident.closed is not None:
            return False
        work.add(ready)
        work.ran_seconds = time.monotonic() - (op.started_at or op.accepted_at)
        fault = fault or operations.failure_in(work)
        if fault is not None:
            self._forget(op)
            self._fan_out.loop.conclude(self._resident, op, fault)
        elif work.complete:
            self._fan_out.loop.conclude(self._resident, op, operations.pass_result(work))
        return True

    def _forget(self, op: RunOp) -> None:
        """Takes back what is still lent of an operation that has failed."""
        for link in self._links:
            for loan in [loan for loan in link.loans() if loan.op is op]:
                link.take_back(loan, "CANCELLED")


_BUSY: Final = frozenset({"QUEUE_FULL", "DRAINING", "NOT_BEGUN"})
"""Reasons for which a chunk may be lent again; not when its helper was lost, for it may have been the cause."""
_NOTHING: Final = np.zeros(0, np.float32)
