"""A run in memory: its order, its results, and whoever waits for either. Single-threaded: the event loop's.

It joins the pure parts (runs, results) with the journal writer and wakes streams and callers. It does not execute
anything; the device loop does.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Protocol

from google.protobuf.duration_pb2 import Duration

from treadle.errors import TreadleError, from_operation_error, make_error, to_operation_error
from treadle.internal.v1 import journal_pb2
from treadle.v1 import training_pb2, types_pb2
from treadle_service import failpoints
from treadle_service.budgets import TenantBudgets
from treadle_trainer import operations
from treadle_trainer.demand import Demand
from treadle_trainer.journal_writer import JournalWriter, Written
from treadle_trainer.op_spans import OpSpans
from treadle_trainer.operations import PassWork
from treadle_trainer.results import ResultLog, StoredResult
from treadle_trainer.runs import (
    BARRIER,
    BATCHED,
    FORWARD_BACKWARD,
    LOAD_STATE,
    OPTIM_STEP,
    WINDOW_BYTES,
    WINDOW_OPS,
    Offer,
    QueuedOp,
    RunOrder,
    Verdict,
)
from treadle_trainer.step_metrics import StepMetrics

# Of operations that had finished before a crash, only these changed what a snapshot or the next step holds.
REPLAYED = frozenset({FORWARD_BACKWARD, OPTIM_STEP, LOAD_STATE})
_PREPARE_INLINE_BYTES = 2**16


class Place(Enum):
    """Where the state of a resident run is."""

    DEVICE = auto()
    """Ready for passes and steps."""
    HOST = auto()
    """In host memory, without gradient."""
    STORE = auto()
    """In the run's newest snapshot only."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """The result that the journal already holds for an operation that is being replayed."""

    failed: bool
    state_digest: bytes


@dataclass(slots=True)
class OpWork:
    """What an operation carries through the queue."""

    operation: training_pb2.Operation
    recorded: Recorded | None = None
    prepared: PassWork | None = None
    limited: bool = True
    """Whether the limits of this trainer hold; what was accepted in an earlier life must not depend on them."""
    device_seconds: float = 0.0
    """Time on the device, the time of a shared pass split by its tokens."""

    @property
    def num_tokens(self) -> int:
        """Positions that have passed over the base."""
        return self.prepared.num_tokens if self.prepared is not None else 0


RunOp = QueuedOp[OpWork]


class Prepare(Protocol):
    """How the batch of an operation is decoded, checked and cut."""

    def __call__(self, operation: training_pb2.Operation, *, limited: bool) -> PassWork:
        """Returns the work of a pass; raises TreadleError if it cannot run."""
        ...


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What does not change while a run is resident."""

    name: str
    tenant: str
    base: str
    lora: types_pb2.LoraConfig
    epoch: int
    max_context: int


class Resident:
    """One run that this trainer holds the lease of."""

    def __init__(
        self,
        facts: RunFacts,
        order: RunOrder[OpWork],
        results: ResultLog,
        *,
        writer: JournalWriter,
        prepare: Prepare,
        wake: Callable[[], None],
        on_diverged: Callable[[Resident, training_pb2.Divergence], None],
        budgets: TenantBudgets,
    ) -> None:
        """Wires a run up; `wake` tells the device loop that there may be something to do.

        `on_diverged` hears of the first replayed operation that went another way.
        """
        self.facts, self.order, self.results = facts, order, results
        self._budgets = budgets
        self._uncharged: dict[int, int] = {}  # Tokens that the tenant's budget was told of, by seq.
        self.diverged: TreadleError | None = None
        self.closed: TreadleError | None = None
        """Why the run is not here any more; its streams end with it."""
        self.draining = False
        """Nothing new is started or accepted."""
        self.snapshot_seq = order.boundary_seq
        self.snapshot_sha256 = ""
        """Blob of the newest snapshot; empty if there is none."""
        self.snapshot_digest = b""
        """Digest of the state in it."""
        self.place = Place.DEVICE
        self.state_bytes = 0
        """Memory of the state, without gradient."""
        self.num_held = 0
        """Works under way during which nothing of the run may start."""
        self.step_seconds = 0.0
        """How long its optimizer steps take; 0 before the first."""
        self.num_streams = 0
        self.came_at = self.last_used = time.monotonic()
        self.demand = Demand(self.came_at)
        self.lease_until = 0.0
        """Until then nobody else can have claimed the run, on the monotonic clock."""
        self._step_metrics = StepMetrics()
        self._writer, self._prepare, self._wake = writer, prepare, wake
        self._on_diverged = on_diverged
        self._spans = OpSpans(facts.name, facts.tenant, facts.epoch)
        self._told_acked_seq = results.acked_seq
        self._changed = asyncio.Event()
        self._preparing: set[asyncio.Task[None]] = set()

    @property
    def name(self) -> str:
        """The run's name."""
        return self.facts.name

    @property
    def busy(self) -> bool:
        """Whether the first operation has started."""
        head = next(iter(self.order), None)
        return head is not None and head.started_at is not None

    @property
    def idle(self) -> bool:
        """Whether the run stands at a step boundary and nothing of it waits, runs or is under way."""
        order = self.order
        quiet = not len(order) and not self.num_held and not self.draining and self.closed is None
        return quiet and order.boundary_seq == order.done_seq

    def credit(self) -> training_pb2.Credit:
        """Returns what the owner may have in flight now."""
        window = self._budgets.window(self.facts.tenant, WINDOW_OPS)
        return training_pb2.Credit(max_seq=self.results.shown_seq + window, max_unfinished_bytes=WINDOW_BYTES)

    def accept(self, operation: training_pb2.Operation, *, hold: bool = False) -> Verdict:
        """Takes an operation into the order and the journal; raises TreadleError if its seq is not right.

        RATE_LIMITED for a new one when its tenant is over its budget; nothing has happened then.
        """
        self.check_open()
        if operation.seq >= self.order.next_seq:
            self._budgets.check(self.facts.tenant)
        num_bytes = operation.ByteSize()
        offer = Offer(
            operation.seq,
            operations.digest_of(operation),
            operation.WhichOneof("kind") or "",
            num_bytes,
            OpWork(operation),
            operations.timeout_of(operation),
        )
        first = self.order.next_seq
        verdict = self.order.offer(offer, time.monotonic(), done_seq=self.results.shown_seq, hold=hold)
        self.last_used = time.monotonic()
        if verdict is Verdict.NEW:
            failpoints.reach("trainer.accepted")
            for op in [op for op in self.order if op.seq >= first]:
                self._writer.append(self.name, op.seq, op.digest, op.work.operation.SerializeToString())
                self.admit(op)
            self.announce()
            self._wake()
        return verdict

    def admit(self, op: RunOp) -> None:
        """Decodes what can be decoded before its turn; an operation that cannot run is doomed to say so."""
        self.demand.begin(time.monotonic())
        if op.work.recorded is None:
            self._uncharged[op.seq] = operations.count_tokens(op.work.operation)
            self._budgets.begin(self.facts.tenant, self._uncharged[op.seq])
        if op.doom is not None or (op.work.recorded is not None and op.kind not in REPLAYED):
            return
        if self.diverged is not None:
            op.doom = self.diverged
        elif op.work.operation.HasField("refused"):
            op.doom = from_operation_error(op.work.operation.refused)
        elif not op.kind:
            op.doom = make_error("BAD_OPERATION", f"operation {op.seq} has no kind; set forward, optim_step or another")
        elif op.kind in BATCHED and op.num_bytes <= _PREPARE_INLINE_BYTES:
            try:
                op.work.prepared = self._prepare(op.work.operation, limited=op.work.limited)
            except TreadleError as error:
                op.doom = error
        elif op.kind in BATCHED:
            # A long batch would hold up every stream if it were decoded on the event loop.
            task = asyncio.create_task(self._prepare_aside(op))
            self._preparing.add(task)
            task.add_done_callback(self._preparing.discard)

    def cancel(self, from_seq: int) -> list[int]:
        """Makes operations from `from_seq` on that have not started fail with CANCELLED; returns their seqs."""
        self.check_open()
        seqs = self.order.doom(
            from_seq, lambda op: make_error("CANCELLED", f"operation {op.seq} was cancelled before it started")
        )
        self._wake()
        return seqs

    def conclude(self, op: RunOp, outcome: training_pb2.OperationResult | TreadleError, digest: bytes = b"") -> bool:
        """Ends the first operation of the order; returns whether the run's gradient must be dropped."""
        self.last_used = time.monotonic()
        failed = isinstance(outcome, TreadleError)
        finished = self.order.finish(op.seq, failed=failed)
        self.demand.worked(op.work.device_seconds, self.last_used)
        if not len(self.order):
            self.demand.end(self.last_used)
        metrics = self._gather(op, outcome)
        if finished.drop_gradient:
            self._step_metrics.clear()
        reason = outcome.reason if isinstance(outcome, TreadleError) else "OK"
        self._spans.concluded(op, reason, replayed=op.work.recorded is not None)
        if op.work.recorded is not None:
            self._compare(op, outcome, digest)
        else:
            if isinstance(outcome, TreadleError):
                result = training_pb2.OperationResult(error=to_operation_error(outcome), failed_seq=op.depends_on)
            else:
                result = outcome
            if op.kind == BARRIER and not failed:
                result.barrier.num_failed = finished.num_failed
            self._stamp(op, result)
            data = result.SerializeToString()
            self._budgets.end(self.facts.tenant)
            commit = journal_pb2.JournalCommit(
                seq=op.seq,
                result=data,
                state_digest=digest,
                num_tokens=op.work.num_tokens,
                device_us=int(op.work.device_seconds * 1e6),
                metrics=metrics,
            )
            self._writer.commit(self.name, commit)
            if self.results.put(op.seq, StoredResult(data, failed)):
                self._spans.shown(self.results.shown_seq)
                self.announce()
        self._wake()
        return finished.drop_gradient

    def written(self, written: Written) -> None:
        """Learns what has become durable, and so is charged."""
        self._release(written.committed_seq or 0)
        self.results.mark_appended(written.appended_seq or 0)
        self.results.mark_committed(written.committed_seq or 0)
        self._spans.shown(self.results.shown_seq)
        self._spans.committed(self.results.committed_seq)
        self._tell_acked()
        self.announce()

    def acknowledge(self, seq: int) -> None:
        """Drops results that a client has received."""
        self.results.ack(seq)
        if self.closed is None:
            self._tell_acked()

    def result(self, seq: int, *, replayed: bool = False) -> training_pb2.OperationResult | None:
        """Returns a result that may be shown."""
        stored = self.results.get(seq)
        if stored is None:
            return None
        result = training_pb2.OperationResult.FromString(stored.data)
        result.replayed = replayed or stored.stored
        return result

    def diverge(self, message: str) -> None:
        """Makes the run read-only: whatever has not finished, and whatever comes, fails with DIVERGED."""
        error = make_error("DIVERGED", message)
        self.diverged = error
        for op in self.order:
            if op.work.recorded is None and op.doom is None and op.started_at is None:
                op.doom = error

    def close(self, error: TreadleError) -> None:
        """Ends the run's stay here; streams and waiting calls end with `error`."""
        self.closed = error
        for op in self.order:
            if op.work.recorded is None:
                self._budgets.end(self.facts.tenant)
        # Charged with a write that is under way, or counted in again where the run is next.
        self._release(max(self._uncharged, default=0))
        for task in self._preparing:
            task.cancel()
        self.announce()

    def is_open(self) -> bool:
        """Tells whether the run is still here."""
        return self.closed is None

    def check_open(self) -> None:
        """Raises if the run has left or is about to."""
        if self.closed is not None:
            raise self.closed
        if self.draining:
            # Not DRAINING: the trainer may stay, and gateways would send nobody else to it for a while.
            raise make_error("WORKER_LOST", "the trainer is handing the run over; connect again and go on", 0.2)

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        """Waits until `condition` holds; raises the reason if the run leaves before."""
        while not condition():
            if self.closed is not None:
                raise self.closed
            await self._changed.wait()

    def changed(self) -> asyncio.Event:
        """Returns an event that is set at the next change; ask again after each."""
        return self._changed

    def _release(self, seq: int) -> None:
        """Stops to count what operations up to `seq` cost on top of what the store has charged."""
        for charged in [uncharged for uncharged in self._uncharged if uncharged <= seq]:
            self._budgets.release(self.facts.tenant, self._uncharged.pop(charged))

    def _tell_acked(self) -> None:
        """Lets the journal drop what was delivered, or given up because nobody acknowledges."""
        if self.results.acked_seq > self._told_acked_seq:
            self._told_acked_seq = self.results.acked_seq
            self._writer.acknowledge(self.name, self._told_acked_seq)

    def announce(self) -> None:
        """Wakes whoever waits for a change."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def _prepare_aside(self, op: RunOp) -> None:
        try:
            op.work.prepared = await asyncio.to_thread(self._prepare, op.work.operation, limited=op.work.limited)
        except TreadleError as error:
            op.doom = op.doom or error
        self._wake()

    def _compare(self, op: RunOp, outcome: training_pb2.OperationResult | TreadleError, digest: bytes) -> None:
        """Checks a replayed operation against what the journal says it was."""
        recorded = op.work.recorded
        if recorded is None or self.diverged is not None:
            return
        if isinstance(outcome, TreadleError) and not recorded.failed:
            message = f"replaying operation {op.seq} failed where it had succeeded: {outcome.message}"
        elif operations.differ(digest, recorded.state_digest):
            message = (
                f"replaying operation {op.seq} gave the state {digest.hex()}, the journal has "
                f"{recorded.state_digest.hex()}; the run is read-only, start a new one from its last checkpoint"
            )
        else:
            return
        self.diverge(message)
        found = training_pb2.Divergence(
            seq=op.seq, recorded_digest=recorded.state_digest, replayed_digest=digest, message=message
        )
        self._on_diverged(self, found)

    def _gather(
        self, op: RunOp, outcome: training_pb2.OperationResult | TreadleError
    ) -> journal_pb2.StepMetrics | None:
        """Counts an operation in with the metrics of its step; returns them when the step has been made."""
        if isinstance(outcome, TreadleError):
            return None
        if op.kind == FORWARD_BACKWARD:
            self._step_metrics.add(outcome.forward_backward, op.work.num_tokens, op.work.device_seconds)
        elif op.kind == OPTIM_STEP:
            return self._step_metrics.step(outcome.optim_step)
        elif op.kind == LOAD_STATE:
            self._step_metrics.clear()
        return None

    def _stamp(self, op: RunOp, result: training_pb2.OperationResult) -> None:
        now = time.monotonic()
        started = now if op.started_at is None else op.started_at
        prepared = op.work.prepared
        ran = now - started if prepared is None else prepared.ran_seconds
        result.seq = op.seq
        result.queued.CopyFrom(_duration(started - op.accepted_at))
        result.ran.CopyFrom(_duration(ran))


def _duration(seconds: float) -> Duration:
    message = Duration()
    message.FromNanoseconds(int(max(seconds, 0.0) * 1e9))
    return message
