"""A ring of the last passes (who shared them, how long they took), running totals, and what is told to monitoring."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from treadle.internal.v1 import trainer_pb2
from treadle_service.tracing import TRACING
from treadle_trainer import counters

KEPT_PASSES: Final = 4000


class PassTrace:
    """What the device has done lately."""

    def __init__(self) -> None:
        self.num_passes = 0
        self.num_shared_passes = 0
        self.num_tokens = 0
        self._ring: deque[trainer_pb2.Pass] = deque(maxlen=KEPT_PASSES)
        self._busy_seconds = 0.0
        self._num_working = 0
        self._working_since = 0.0

    @property
    def busy_seconds(self) -> float:
        """Time in which a pass or an optimizer step, or both, were under way."""
        return self._busy_seconds + (time.monotonic() - self._working_since if self._num_working else 0.0)

    @contextmanager
    def working(self) -> Iterator[None]:
        """Counts the time inside as busy; what overlaps counts once."""
        if not self._num_working:
            self._working_since = time.monotonic()
        self._num_working += 1
        try:
            yield
        finally:
            self._num_working -= 1
            if not self._num_working:
                self._busy_seconds += time.monotonic() - self._working_since

    def add(
        self,
        started: float,
        took: float,
        chunks: Sequence[tuple[str, int, int]],
        num_steps_beside: int = 0,
        expected: float = 0.0,
    ) -> None:
        """Notes a pass that began at `started` (Unix time) with chunks (run, seq, tokens); 0 expected: nobody knew."""
        entry = trainer_pb2.Pass(num_steps_beside=num_steps_beside)
        if expected:
            entry.expected.FromNanoseconds(int(expected * 1e9))
        entry.started.FromNanoseconds(int(started * 1e9))
        entry.took.FromNanoseconds(int(took * 1e9))
        shares: dict[str, trainer_pb2.PassShare] = {}
        for run, seq, num_tokens in chunks:
            share = shares.setdefault(run, trainer_pb2.PassShare(run=run))
            share.num_tokens += num_tokens
            if seq not in share.seqs:
                share.seqs.append(seq)
            self.num_tokens += num_tokens
        entry.shares.extend(shares.values())
        self._ring.append(entry)
        self.num_passes += 1
        self.num_shared_passes += len(shares) > 1
        counters.pass_ended(took, len(shares), sum(share.num_tokens for share in shares.values()))
        if TRACING.on:
            facts = {"num_runs": len(shares), "num_steps_beside": num_steps_beside}
            for run, seq, num_tokens in chunks:
                TRACING.op_span("pass", run, seq, started, started + took, {**facts, "num_tokens": num_tokens})

    def last(self, limit: int, after_ns: int = 0) -> list[trainer_pb2.Pass]:
        """Returns the last `limit` passes, those that began later than a Unix time in nanoseconds; newest last."""
        newest: list[trainer_pb2.Pass] = []
        for entry in reversed(self._ring):
            if len(newest) == limit or entry.started.ToNanoseconds() <= after_ns:
                break
            newest.append(entry)
        return newest[::-1]
