"""The life of each operation of a run, told to monitoring when it ends: how long it waited, ran and became durable.

An operation's root span begins with its acceptance and ends when its result is durable, so that it is there for every
operation whoever else traces. Knows nothing of what operations do.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import Any

from treadle_service.tracing import TRACING, Attributes, unix_time
from treadle_trainer import counters
from treadle_trainer.runs import BATCHED, QueuedOp


@dataclass(frozen=True, slots=True)
class _Ended:
    """An operation whose result is not durable yet; times in Unix seconds."""

    seq: int
    kind: str
    accepted: float
    ended: float
    attributes: Attributes


class OpSpans:
    """Counts and traces the operations of one run."""

    def __init__(self, run: str, tenant: str, epoch: int) -> None:
        self._run = run
        self._facts: Attributes = {"tenant": tenant, "epoch": epoch}
        self._ended: list[_Ended] = []
        self._unshown: deque[tuple[int, float]] = deque()

    def concluded(self, op: QueuedOp[Any], reason: str, *, replayed: bool) -> None:
        """Hears of an operation's end, `reason` being its error's or OK; a replayed one ended long ago."""
        now = time.monotonic()
        started = now if op.started_at is None else op.started_at
        if replayed:
            counters.REPLAYED.inc()
        else:
            counters.operation_ended(op.kind, reason, started - op.accepted_at, now - op.accepted_at)
            self._unshown.append((op.seq, now))
        if not TRACING.keeps(self._run, op.seq):
            return
        began, ended = unix_time(started), unix_time(now)
        if replayed:
            TRACING.op_span("replay", self._run, op.seq, began, ended, self._facts)
            return
        accepted = unix_time(op.accepted_at)
        TRACING.op_span("queued", self._run, op.seq, accepted, began)
        if op.kind not in BATCHED and op.started_at is not None:
            TRACING.op_span(op.kind, self._run, op.seq, began, ended)
        self._ended.append(_Ended(op.seq, op.kind, accepted, ended, {**self._facts, "reason": reason}))

    def shown(self, seq: int) -> None:
        """Hears up to where results may be shown."""
        while self._unshown and self._unshown[0][0] <= seq:
            counters.WITHHELD.observe(time.monotonic() - self._unshown.popleft()[1])

    def committed(self, seq: int) -> None:
        """Hears up to where results are durable."""
        while self._ended and self._ended[0].seq <= seq:
            op, now = self._ended.pop(0), time.time()
            TRACING.op_span("durable", self._run, op.seq, op.ended, now)
            TRACING.root_span(f"operation {op.kind}", self._run, op.seq, op.accepted, now, op.attributes)
