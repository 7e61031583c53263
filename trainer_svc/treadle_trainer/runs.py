"""The order of one run's operations as a pure state machine: what is accepted, what may start, what fails with what.

Operations take effect strictly by seq. The clock is passed in and nothing is executed, journaled or sent here; the
machine does not know batches, tensors, streams or the store.

The failure rule: when a forward_backward fails, the gradient behind it is not what its owner believes. The next
optim_step then fails with DEPENDENCY_FAILED, or the next barrier reports it; either way the gradient is dropped and
the run is clean again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum, auto
from itertools import takewhile
from typing import Final, Generic, TypeVar

from treadle.errors import TreadleError, make_error

WINDOW_OPS: Final = 16
"""How many operations a client may have unfinished; covers 200 ms of round trip at 35 ms a step."""
WINDOW_BYTES: Final = 32 * 2**20
"""How many bytes of unfinished operations a client may have."""
REMEMBERED_DIGESTS: Final = 1024
"""Of how many finished operations the digest is kept, to tell a repeat from a reuse."""

FORWARD: Final = "forward"
FORWARD_BACKWARD: Final = "forward_backward"
OPTIM_STEP: Final = "optim_step"
LOAD_STATE: Final = "load_state"
BARRIER: Final = "barrier"
BATCHED: Final = frozenset({FORWARD, FORWARD_BACKWARD})
"""Kinds that need a pass over the base."""

WorkT = TypeVar("WorkT")


class Verdict(Enum):
    """What became of an operation that was offered."""

    NEW = auto()
    """It is in the run's order now."""
    HELD = auto()
    """It waits, outside the order, for the ones before it."""
    DUPLICATE = auto()
    """It had been accepted before."""


@dataclass(slots=True)
class QueuedOp(Generic[WorkT]):
    """An accepted operation that has not finished."""

    seq: int
    digest: int
    kind: str
    num_bytes: int
    accepted_at: float
    start_by: float | None
    work: WorkT
    doom: TreadleError | None = None
    """Set when it must fail instead of running."""
    depends_on: int = 0
    """The failed operation that it stood on, if that is why it fails."""
    started_at: float | None = None


@dataclass(frozen=True, slots=True)
class Offer(Generic[WorkT]):
    """An operation as it arrives; `timeout_seconds` counts from its acceptance."""

    seq: int
    digest: int
    kind: str
    num_bytes: int
    work: WorkT
    timeout_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Finished:
    """What the end of an operation means for the run."""

    drop_gradient: bool
    num_failed: int = 0
    """For a barrier: failed operations since the one before."""


class RunOrder(Generic[WorkT]):
    """The operations of one run, from acceptance to their end, by seq."""

    def __init__(self, done_seq: int = 0, num_failed: int = 0) -> None:
        """Starts behind `done_seq`, at a step boundary, with failures that no barrier has reported yet."""
        self.done_seq = done_seq
        self.boundary_seq = done_seq
        """Last finished operation behind which no gradient was pending: where a snapshot may stand."""
        self.num_failed = num_failed
        self._next_seq = done_seq + 1
        self._queue: dict[int, QueuedOp[WorkT]] = {}
        self._held: dict[int, Offer[WorkT]] = {}
        self._digests: dict[int, int] = {}
        self._gradient_pending = False
        self._failed_gradient_seq = 0

    @property
    def next_seq(self) -> int:
        """The first seq that is not in the order."""
        return self._next_seq

    @property
    def unfinished_bytes(self) -> int:
        """Bytes of all operations that wait or run."""
        return sum(op.num_bytes for op in self._queue.values()) + sum(op.num_bytes for op in self._held.values())

    def __len__(self) -> int:
        return len(self._queue)

    def __iter__(self) -> Iterator[QueuedOp[WorkT]]:
        return iter(self._queue.values())

    def offer(self, offer: Offer[WorkT], now: float, *, done_seq: int, hold: bool = False) -> Verdict:
        """Takes an operation into the order, together with held ones that follow it.

        Args:
            offer: the operation.
            now: the clock, in seconds.
            done_seq: last seq whose result its owner can see; the window counts from there.
            hold: keep an operation that is ahead of its turn, instead of SEQ_GAP.

        Raises:
            SequenceError: SEQ_GAP, or CREDIT_EXCEEDED when it is beyond the window.
            SeqReusedError: SEQ_REUSED, the seq was accepted with another digest.
        """
        if offer.seq < 1:
            raise make_error("SEQ_GAP", "operations are numbered from 1")
        known = self._digests.get(offer.seq)
        if known is None and offer.seq in self._held:
            known = self._held[offer.seq].digest
        if known is not None and known != offer.digest:
            raise make_error(
                "SEQ_REUSED",
                f"seq {offer.seq} was sent before with other content; the next free seq is {self.next_seq}",
            )
        if offer.seq < self._next_seq or offer.seq in self._held:
            return Verdict.DUPLICATE if offer.seq < self._next_seq else Verdict.HELD
        self._check_window(offer, done_seq)
        if offer.seq > self._next_seq:
            if not hold:
                raise make_error(
                    "SEQ_GAP", f"the run expects seq {self.next_seq}, got {offer.seq}: send from {self.next_seq} on"
                )
            self._held[offer.seq] = offer
            return Verdict.HELD
        self._enter(offer, now)
        while self._next_seq in self._held:
            self._enter(self._held.pop(self._next_seq), now)
        return Verdict.NEW

    def restore(self, offer: Offer[WorkT], now: float) -> QueuedOp[WorkT]:
        """Takes an operation that was accepted in an earlier life, whatever the window says."""
        self._enter(offer, now)
        return self._queue[offer.seq]

    def remember(self, seq: int, digest: int) -> None:
        """Notes the digest of an operation that a snapshot covers."""
        self._digests[seq] = digest

    def forget_held(self, seq: int) -> None:
        """Drops an operation that waited in vain for the ones before it."""
        self._held.pop(seq, None)

    def runnable_batch(self) -> list[QueuedOp[WorkT]]:
        """Returns the leading run of passes' work: consecutive forward and forward_backward, none of them doomed."""
        return list(takewhile(lambda op: op.kind in BATCHED and op.doom is None, self._queue.values()))

    def head(self) -> QueuedOp[WorkT] | None:
        """Returns the first unfinished operation, with its doom set if it must fail for those before it."""
        op = next(iter(self._queue.values()), None)
        if op is None or op.started_at is not None or op.doom is not None:
            return op
        if op.kind == OPTIM_STEP and self._failed_gradient_seq:
            op.depends_on = self._failed_gradient_seq
            op.doom = make_error(
                "DEPENDENCY_FAILED",
                f"forward_backward {self._failed_gradient_seq} failed, so the gradient behind optim_step {op.seq} is "
                "not whole; it was dropped. Send the batch again, then the step",
            )
        return op

    def finish(self, seq: int, *, failed: bool) -> Finished:
        """Ends the first unfinished operation and moves the run on."""
        op = self._queue.pop(seq)
        if seq != self.done_seq + 1:
            raise RuntimeError(f"operation {seq} ended before {self.done_seq + 1}")
        self.done_seq = seq
        drop, reported = False, 0
        if failed:
            self.num_failed += 1
        if op.kind == FORWARD_BACKWARD:
            self._gradient_pending = True
            if failed and not self._failed_gradient_seq:
                self._failed_gradient_seq = seq
        elif op.kind == OPTIM_STEP or (op.kind == LOAD_STATE and not failed):
            # A step that did not happen must not leave its gradient to the next one; one that did has used it up.
            drop = self._clean() and failed
        elif op.kind == BARRIER and not failed:
            reported, self.num_failed = self.num_failed, 0
            drop = self._failed_gradient_seq != 0 and self._clean()
        if not self._gradient_pending:
            self.boundary_seq = seq
        self._digests.pop(seq - REMEMBERED_DIGESTS, None)
        return Finished(drop, reported)

    def doom(self, from_seq: int, error: Callable[[QueuedOp[WorkT]], TreadleError]) -> list[int]:
        """Makes operations from `from_seq` on that have not started fail at their turn; returns their seqs."""
        waiting = [op for op in self if op.seq >= from_seq and op.started_at is None and op.doom is None]
        for op in waiting:
            op.doom = error(op)
        return [op.seq for op in waiting]

    def expire(self, now: float) -> None:
        """Makes operations that have not started in time fail at their turn with QUEUE_TIMEOUT."""
        for op in self:
            if op.start_by is not None and op.start_by <= now and op.started_at is None and op.doom is None:
                waited = now - op.accepted_at
                op.doom = make_error(
                    "QUEUE_TIMEOUT",
                    f"operation {op.seq} waited {waited:.1f} s without starting; send it again as a new one",
                )

    def next_expiry(self) -> float | None:
        """Returns when the next waiting operation expires, on the same clock."""
        times = [op.start_by for op in self if op.start_by is not None and op.started_at is None and op.doom is None]
        return min(times, default=None)

    def _check_window(self, offer: Offer[WorkT], done_seq: int) -> None:
        if offer.seq > done_seq + WINDOW_OPS:
            raise make_error(
                "CREDIT_EXCEEDED",
                f"seq {offer.seq} is more than {WINDOW_OPS} ahead of the last result ({done_seq}); wait",
            )
        waiting = self.unfinished_bytes
        if waiting and waiting + offer.num_bytes > WINDOW_BYTES:
            raise make_error(
                "CREDIT_EXCEEDED", f"{waiting} bytes of operations are unfinished, at most {WINDOW_BYTES} may be; wait"
            )

    def _enter(self, offer: Offer[WorkT], now: float) -> None:
        start_by = None if offer.timeout_seconds is None else now + offer.timeout_seconds
        self._queue[offer.seq] = QueuedOp(
            offer.seq, offer.digest, offer.kind, offer.num_bytes, now, start_by, offer.work
        )
        self._digests[offer.seq] = offer.digest
        self._next_seq = offer.seq + 1

    def _clean(self) -> bool:
        """Forgets the pending gradient; returns whether there was one."""
        had = self._gradient_pending
        self._gradient_pending, self._failed_gradient_seq = False, 0
        return had
