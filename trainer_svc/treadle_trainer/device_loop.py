"""What the device does next: settle what needs no device, take the short turns that runs asked for, then one pass.

A round is deterministic in its shape: steps and exports of all runs that are ready come first, so that their next
batches can share the pass that follows. Operations of one run take effect by seq; everything they touch belongs to
that run alone. Knows runs as Resident objects; the journal and the wire are theirs.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

from treadle.errors import TreadleError
from treadle.v1 import training_pb2
from treadle_service.logs import get_logger
from treadle_trainer import operations
from treadle_trainer.device import Device, PassChunk
from treadle_trainer.executor import Executor
from treadle_trainer.operations import PassWork
from treadle_trainer.resident import REPLAYED, Resident, RunOp
from treadle_trainer.runs import BARRIER, BATCHED, OPTIM_STEP
from treadle_trainer.scheduler import FairScheduler, RunQueue, Waiting
from treadle_trainer.trace import PassTrace

log = get_logger(__name__)
Turn = Callable[[], Awaitable[None]]
Result = training_pb2.OperationResult


@dataclass(frozen=True, slots=True)
class PickedChunk:
    """A chunk of an operation, as the scheduler hands it back."""

    resident: Resident
    op: RunOp
    work: PassWork
    index: int

    def as_chunk(self) -> PassChunk:
        """Returns the chunk as the device takes it."""
        return PassChunk(self.resident.name, self.work.chunks[self.index], self.work.loss, self.work.forward_only)


class DeviceLoop:
    """Feeds the executor; `run_forever` must be running."""

    def __init__(
        self, executor: Executor, trace: PassTrace, max_tokens_per_pass: int, on_step: Callable[[Resident, int], None]
    ) -> None:
        """`on_step` hears of each optimizer step right after it, before anything else happens to the run."""
        self._executor, self._trace, self._on_step = executor, trace, on_step
        self._scheduler: FairScheduler[PickedChunk] = FairScheduler(max_tokens_per_pass)
        self._residents: dict[str, Resident] = {}
        self._turns: list[Turn] = []
        self._wake = asyncio.Event()
        # Kinds that need more than the device: the trainer gives each its own way to start.
        self.starters: dict[str, Callable[[Resident, RunOp], None]] = {OPTIM_STEP: self._start_optim_step}

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

    def request_turn(self, turn: Turn) -> None:
        """Has `turn` awaited between passes, after the turns that were requested before."""
        self._turns.append(turn)
        self.wake()

    def conclude(self, resident: Resident, op: RunOp, outcome: Result | TreadleError, digest: bytes = b"") -> None:
        """Ends an operation; drops the run's gradient where the failure rule says so."""
        if resident.closed is not None:
            return
        if resident.conclude(op, outcome, digest):
            # Queued at once, so that it comes before any pass that is picked from here on.
            self._executor.call(Device.clear_gradient, resident.name)

    async def run_forever(self) -> None:
        """Runs rounds until cancelled."""
        while True:
            await self._wait()
            self._settle_all()
            turns, self._turns = self._turns, []
            for turn in turns:
                await turn()
            self._settle_all()
            picked = self._scheduler.pick(self._queues())
            if picked:
                await self._run_pass(picked)
                self.wake()
            if self._turns:
                self.wake()

    async def _wait(self) -> None:
        """Sleeps until woken, or until the next operation has waited too long."""
        expiries = [expiry for run in self._working() if (expiry := run.order.next_expiry()) is not None]
        timeout = max(0.0, min(expiries) - time.monotonic()) if expiries else None
        try:
            async with asyncio.timeout(timeout):
                await self._wake.wait()
        except TimeoutError:
            pass
        self._wake.clear()

    def _working(self) -> list[Resident]:
        return [run for run in self._residents.values() if len(run.order) and not run.draining and run.closed is None]

    def _settle_all(self) -> None:
        for resident in self._working():
            resident.order.expire(time.monotonic())
            self._settle(resident)

    def _settle(self, resident: Resident) -> None:
        """Ends or starts first operations until one needs a pass, or has started."""
        while (op := resident.order.head()) is not None and op.started_at is None:
            recorded = op.work.recorded
            if op.doom is not None:
                self.conclude(resident, op, op.doom)
            elif (
                recorded is not None and (op.kind not in REPLAYED or resident.diverged is not None)
            ) or op.kind == BARRIER:
                self.conclude(resident, op, Result())
            elif op.kind in BATCHED:
                return
            else:
                op.started_at = time.monotonic()
                self.starters[op.kind](resident, op)
                return

    def _start_optim_step(self, resident: Resident, op: RunOp) -> None:
        async def step() -> None:
            if resident.closed is not None:
                return
            began = time.monotonic()
            try:
                params = operations.adam_params(op.work.operation.optim_step.adam)
                stepped = await self._executor.call(Device.optim_step, resident.name, params)
            except TreadleError as error:
                self.conclude(resident, op, error)
                return
            finally:
                self._trace.busy_seconds += time.monotonic() - began
            result = Result()
            result.optim_step.step = stepped.step
            for key, value in stepped.metrics.items():
                result.optim_step.metrics[key] = value
            self.conclude(resident, op, result, stepped.digest)
            self._on_step(resident, stepped.step)

        self.request_turn(step)

    def _queues(self) -> list[RunQueue[PickedChunk]]:
        return [
            RunQueue(run.name, run.facts.tenant, chunks)
            for run in self._working()
            if (chunks := list(_waiting_chunks(run)))
        ]

    async def _run_pass(self, picked: list[PickedChunk]) -> None:
        started = time.time()
        began = time.monotonic()
        for pick in picked:
            if pick.op.started_at is None:
                pick.op.started_at = began
        pairs = [(pick, pick.as_chunk()) for pick in picked]
        fault: TreadleError | None = None
        try:
            results = await self._executor.call(Device.run_pass, [chunk for _, chunk in pairs])
        except TreadleError as error:
            fault, results = error, []
        took = time.monotonic() - began
        shares = [(pick.resident.name, pick.op.seq, chunk.batch.num_tokens) for pick, chunk in pairs]
        self._trace.add(started, took, shares)
        for pick, result in zip(picked, results, strict=fault is None):
            pick.work.results.append(result)
        seen: set[tuple[str, int]] = set()
        for pick in picked:
            if (key := (pick.resident.name, pick.op.seq)) not in seen:
                seen.add(key)
                self._conclude_batched(pick, took, fault)

    def _conclude_batched(self, pick: PickedChunk, took: float, fault: TreadleError | None) -> None:
        """Ends a forward or forward_backward whose last chunk, or a failing one, was in the pass."""
        resident, op, work = pick.resident, pick.op, pick.work
        work.ran_seconds += took
        error = fault or operations.failure_in(work)
        if error is not None:
            self.conclude(resident, op, error)
        elif work.complete:
            self.conclude(resident, op, operations.pass_result(work))


def _waiting_chunks(resident: Resident) -> Iterable[Waiting[PickedChunk]]:
    """Yields the chunks of a run that may go into the next pass, in order."""
    for op in resident.order.runnable_batch():
        prepared = op.work.prepared
        if prepared is None:
            return
        for index in range(len(prepared.results), len(prepared.chunks)):
            yield Waiting(prepared.chunks[index].num_tokens, PickedChunk(resident, op, prepared, index))
