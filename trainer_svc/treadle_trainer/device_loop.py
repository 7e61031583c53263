"""What the device does next: start what needs no pass, then fill a pass, again and again.

Passes run one at a time. Optimizer steps, saves and loads run on the thread beside them, and never hold a pass up; a
run of which one is under way contributes nothing to passes, so operations of one run take effect by seq. Everything
they touch belongs to that run alone. Knows runs as Resident objects; the journal and the wire are theirs.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from treadle.errors import TreadleError
from treadle.v1 import training_pb2
from treadle_engine.batch import TokenBatch
from treadle_engine.passes import ChunkResult
from treadle_service import failpoints
from treadle_service.logs import get_logger
from treadle_trainer import operations
from treadle_trainer.budget import Pace, PassBudget
from treadle_trainer.device import Device, PassChunk
from treadle_trainer.executor import Executor
from treadle_trainer.operations import PassWork
from treadle_trainer.pass_length import PassLength
from treadle_trainer.resident import REPLAYED, Place, Resident, RunOp
from treadle_trainer.runs import BARRIER, BATCHED, OPTIM_STEP
from treadle_trainer.scheduler import FairScheduler, RunQueue, Waiting
from treadle_trainer.trace import PassTrace

PATIENCE: Final = 0.1
LEAST_PATIENCE_SECONDS: Final = 0.005
"""How long the next pass may wait for steps under way: a share of the pass before it, or about a pass's fixed cost.

A run whose step ends a moment later would miss that pass and go alone in the next: for many small runs, waiting that
moment costs less than the passes that they would not share. Steps that take longer are never waited for.
"""

log = get_logger(__name__)
Result = training_pb2.OperationResult


class PassPart(Protocol):
    """What the scheduler puts into a pass: a chunk, of a run that is held here or of another trainer's."""

    @property
    def run(self) -> str:
        """The run."""
        ...

    @property
    def seq(self) -> int:
        """The operation."""
        ...

    def as_chunk(self) -> PassChunk:
        """Returns the chunk as the device takes it."""
        ...

    def begin(self, now: float) -> None:
        """Notes that the pass begins."""
        ...

    def end(self, result: ChunkResult | None, fault: TreadleError | None, seconds: float) -> None:
        """Takes what the pass gave, None where it failed as a whole, and the chunk's share of its time."""
        ...


class Borrower(Protocol):
    """Who takes chunks that are computed apart: their gradients are not in the run's yet."""

    def begun(self, op: RunOp, work: PassWork, index: int) -> None:
        """Notes that a chunk is in a pass."""

    def ended(
        self, op: RunOp, work: PassWork, index: int, result: ChunkResult | None, fault: TreadleError | None
    ) -> None:
        """Takes what the pass gave."""


@dataclass(frozen=True, slots=True)
class PickedChunk:
    """A chunk of an operation of a run that is held here; computed apart if there is a borrower."""

    resident: Resident
    op: RunOp
    work: PassWork
    index: int
    borrower: Borrower | None = None

    @property
    def run(self) -> str:
        """The run."""
        return self.resident.name

    @property
    def seq(self) -> int:
        """The operation."""
        return self.op.seq

    @property
    def batch(self) -> TokenBatch:
        """The chunk's content."""
        return self.work.chunks[self.index]

    def as_chunk(self) -> PassChunk:
        """Returns the chunk as the device takes it."""
        return PassChunk(self.run, self.batch, self.work.loss, self.work.forward_only, self.borrower is not None)

    def begin(self, now: float) -> None:
        """Starts the operation with its first chunk."""
        if self.op.started_at is None:
            self.op.started_at = now
        if self.borrower is not None:
            self.borrower.begun(self.op, self.work, self.index)

    def end(self, result: ChunkResult | None, fault: TreadleError | None, seconds: float) -> None:
        """Notes the result where it belongs; ends no operation."""
        self.op.work.device_seconds += seconds
        if self.borrower is not None:
            self.borrower.ended(self.op, self.work, self.index, result, fault)
        elif result is not None:
            self.work.results.append(result)


class Lender(Protocol):
    """Who has chunks of large batches computed elsewhere."""

    def local(self, resident: Resident, picks: list[PickedChunk]) -> list[PickedChunk]:
        """Returns which of a run's waiting chunks the next pass may take, and how."""

    def feed(self) -> None:
        """Lends what may be lent."""


class NoLender:
    """Computes everything here."""

    def local(self, resident: Resident, picks: list[PickedChunk]) -> list[PickedChunk]:
        """Returns all of them."""
        return picks

    def feed(self) -> None:
        """Does nothing."""


class DeviceLoop:
    """Feeds the executor; `run_forever` must be running."""

    def __init__(
        self, executor: Executor, trace: PassTrace, budget: PassBudget, on_step: Callable[[Resident, int], None]
    ) -> None:
        """`on_step` hears of each optimizer step right after it, before anything else happens to the run."""
        self._executor, self._trace, self._on_step = executor, trace, on_step
        self._budget, self._pace = budget, Pace()
        self._length = PassLength(budget.fixed_seconds)
        self._scheduler: FairScheduler[PassPart] = FairScheduler(budget.max_tokens)
        self._residents: dict[str, Resident] = {}
        self._pass: asyncio.Task[None] | None = None
        self._pass_seconds = 0.0
        self._steps_beside = 0
        self._stepping: set[Resident] = set()
        self._patient_until: float | None = None
        self._works: set[asyncio.Task[None]] = set()
        self._wake = asyncio.Event()
        # Kinds that need no pass: the trainer gives each its own way to start.
        self.starters: dict[str, Callable[[Resident, RunOp], None]] = {OPTIM_STEP: self._start_optim_step}
        # What is to be done for a run that has work but whose state is not on the device.
        self.bring_in: Callable[[Resident], None] = lambda resident: None
        self.lender: Lender = NoLender()
        # Other trainers' chunks that wait here.
        self.guests: Callable[[], list[RunQueue[PassPart]]] = list
        self.own_waiting_tokens = 0
        """Positions of the runs held here that waited when a pass was last filled."""

    @property
    def pace(self) -> float:
        """How much longer passes take than their measured cost says, lately."""
        return self._pace.factor

    def add(self, resident: Resident) -> None:
        """Serves a run from now on."""
        self._residents[resident.name] = resident
        self.wake()

    def remove(self, name: str) -> None:
        """Serves a run no longer."""
        self._residents.pop(name, None)

    def wake(self) -> None:
        """Says that there may be something to do."""
        self._wake.set()

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs `work` beside everything else; a fault in it ends the loop."""
        task = asyncio.create_task(work)
        self._works.add(task)
        task.add_done_callback(lambda _: self.wake())

    def conclude(self, resident: Resident, op: RunOp, outcome: Result | TreadleError, digest: bytes = b"") -> None:
        """Ends an operation; drops the run's gradient where the failure rule says so."""
        if resident.closed is not None:
            return
        if resident.conclude(op, outcome, digest):
            self.hold(resident, self._executor.beside(Device.clear_gradient, resident.name))

    def hold(self, resident: Resident, until: asyncio.Future[Any]) -> None:
        """Starts nothing of a run until `until` is done."""
        resident.num_held += 1

        def end(_: asyncio.Future[Any]) -> None:
            resident.num_held -= 1
            self.wake()

        until.add_done_callback(end)

    async def run_forever(self) -> None:
        """Runs rounds until cancelled."""
        while True:
            await self._wait()
            self._look_for_faults()
            for resident in self._working():
                resident.order.expire(time.monotonic())
                if not resident.draining:
                    self._settle(resident)
            self.lender.feed()
            if self._pass is not None:
                continue
            queues = self._queues()
            if not queues:
                self._patient_until = None
            elif not self._patient():
                self._begin_pass(self._scheduler.pick(queues, self._pass_limit(queues)))

    def _pass_limit(self, queues: Sequence[RunQueue[PassPart]]) -> float:
        """Returns the seconds that the next pass's chunks may take, by their measured cost."""
        most = self._budget.target_seconds / self._pace.factor - self._budget.fixed_seconds
        brought = ((queue.tenant, sum(waiting.seconds for waiting in queue.chunks)) for queue in queues)
        return self._length.limit(brought, time.monotonic(), most)

    async def _wait(self) -> None:
        """Sleeps until woken, until the next operation has waited too long, or until patience ends."""
        times = [expiry for run in self._working() if (expiry := run.order.next_expiry()) is not None]
        if self._patient_until is not None and self._pass is None:
            times.append(self._patient_until)
        timeout = max(0.0, min(times) - time.monotonic()) if times else None
        try:
            async with asyncio.timeout(timeout):
                await self._wake.wait()
        except TimeoutError:
            pass
        self._wake.clear()

    def _look_for_faults(self) -> None:
        """Raises what ended a pass or another work, which only a fault in this process can."""
        for task in [task for task in self._works if task.done()]:
            self._works.discard(task)
            task.result()
        if self._pass is not None and self._pass.done():
            ended, self._pass = self._pass, None
            ended.result()

    def _patient(self) -> bool:
        """Tells whether steps end so soon that the pass had better wait for the batches queued behind them."""
        now = time.monotonic()
        limit = max(PATIENCE * self._pass_seconds, LEAST_PATIENCE_SECONDS)
        if not any(len(run.order) > 1 and run.step_seconds <= limit for run in self._stepping):
            return False
        if self._patient_until is None:
            self._patient_until = now + limit
        return now < self._patient_until

    def _working(self) -> list[Resident]:
        return [run for run in self._residents.values() if len(run.order) and not run.num_held and run.closed is None]

    def _settle(self, resident: Resident) -> None:
        """Ends or starts first operations until one needs a pass, or has started."""
        while not resident.num_held and (op := resident.order.head()) is not None and op.started_at is None:
            recorded = op.work.recorded
            if op.doom is not None:
                self.conclude(resident, op, op.doom)
            elif (
                recorded is not None and (op.kind not in REPLAYED or resident.diverged is not None)
            ) or op.kind == BARRIER:
                self.conclude(resident, op, Result())
            elif resident.place is not Place.DEVICE:
                self.bring_in(resident)
                return
            elif op.kind in BATCHED:
                return
            else:
                op.started_at = time.monotonic()
                self.starters[op.kind](resident, op)
                return

    def _start_optim_step(self, resident: Resident, op: RunOp) -> None:
        began = time.monotonic()
        self._stepping.add(resident)
        self._steps_beside += 1

        async def step() -> None:
            try:
                params = operations.adam_params(op.work.operation.optim_step.adam)
                with self._trace.working():
                    stepped = await self._executor.beside(Device.optim_step, resident.name, params)
            except TreadleError as error:
                self.conclude(resident, op, error)
                return
            finally:
                self._stepping.discard(resident)
                op.work.device_seconds = time.monotonic() - began
                # The shortest so far: the others waited for a processor, or for other runs' steps.
                resident.step_seconds = min(resident.step_seconds or math.inf, op.work.device_seconds)
            if resident.closed is not None:
                return
            failpoints.reach("trainer.step")
            result = Result()
            result.optim_step.step = stepped.step
            for key, value in stepped.metrics.items():
                result.optim_step.metrics[key] = value
            self.conclude(resident, op, result, stepped.digest)
            self._on_step(resident, stepped.step)

        self.spawn(step())

    def _queues(self) -> list[RunQueue[PassPart]]:
        queues: list[RunQueue[PassPart]] = []
        for run in self._working():
            if run.place is Place.DEVICE:
                picks = self.lender.local(run, list(self._waiting_chunks(run)))
                chunks = [self._as_waiting(pick) for pick in picks]
                if chunks:
                    queues.append(RunQueue(run.name, run.facts.tenant, chunks))
        self.own_waiting_tokens = sum(waiting.num_tokens for queue in queues for waiting in queue.chunks)
        return queues + self.guests()

    def _as_waiting(self, pick: PickedChunk) -> Waiting[PassPart]:
        return Waiting(pick.batch.num_tokens, pick, self._budget.seconds(pick.batch.lengths_R))

    def _waiting_chunks(self, resident: Resident) -> Iterable[PickedChunk]:
        """Yields the chunks of a run that may go into the next pass, in order."""
        for op in resident.order.runnable_batch():
            prepared = op.work.prepared
            # A run that leaves finishes what it has begun, and begins nothing.
            if prepared is None or (resident.draining and op.started_at is None):
                return
            for index in prepared.waiting:
                yield PickedChunk(resident, op, prepared, index)

    def _begin_pass(self, picked: list[PassPart]) -> None:
        began = time.monotonic()
        for part in picked:
            part.begin(began)
        self._patient_until = None
        # Steps that start while the pass runs are counted as they come.
        self._steps_beside = len(self._stepping)
        self._pass = asyncio.create_task(self._run_pass(picked, began))
        self._pass.add_done_callback(lambda _: self.wake())

    async def _run_pass(self, picked: list[PassPart], began: float) -> None:
        started = time.time()
        chunks = [part.as_chunk() for part in picked]
        results: Sequence[ChunkResult | None]
        fault: TreadleError | None = None
        try:
            with self._trace.working():
                results = await self._executor.call(Device.run_pass, chunks)
        except TreadleError as error:
            fault, results = error, [None] * len(chunks)
        took = self._pass_seconds = time.monotonic() - began
        failpoints.reach("trainer.pass")
        usual = self._budget.fixed_seconds + sum(self._budget.seconds(chunk.batch.lengths_R) for chunk in chunks)
        pairs = zip(picked, chunks, strict=True)
        shares = [(part.run, part.seq, chunk.batch.num_tokens) for part, chunk in pairs]
        self._trace.add(started, took, shares, self._steps_beside, usual * self._pace.factor)
        self._pace.learn(usual, took)
        num_tokens = sum(share[2] for share in shares)
        for part, share, result in zip(picked, shares, results, strict=True):
            part.end(result, fault, took * share[2] / max(num_tokens, 1))
        seen: set[tuple[str, int]] = set()
        for part in picked:
            if isinstance(part, PickedChunk) and part.borrower is None and (key := (part.run, part.seq)) not in seen:
                seen.add(key)
                self._conclude_batched(part, took, fault)

    def _conclude_batched(self, pick: PickedChunk, took: float, fault: TreadleError | None) -> None:
        """Ends a forward or forward_backward whose last chunk, or a failing one, was in the pass."""
        resident, op, work = pick.resident, pick.op, pick.work
        work.ran_seconds += took
        error = fault or operations.failure_in(work)
        if error is not None:
            self.conclude(resident, op, error)
        elif work.complete:
            self.conclude(resident, op, operations.pass_result(work))
