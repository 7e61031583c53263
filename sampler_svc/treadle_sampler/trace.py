"""A ring of the last decode steps, the time spent in all of them, and their distribution for monitoring.

Written by the decoder's thread, read by any other. Knows nothing else.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from prometheus_client import Histogram

from treadle_service.metrics import COUNTS, SECONDS

_STEP_SECONDS: Final = Histogram("treadle_sampler_step_seconds", "Decode steps", buckets=SECONDS)
_STEP_ROWS: Final = Histogram("treadle_sampler_step_sequences", "Sequences that share a step", buckets=COUNTS)
KEPT_STEPS: Final = 10_000


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """One step: when it began (Unix time), how long it took, both in seconds; its sequences and drawn tokens.

    `owners` are the tenants whose sequences were in it, with their numbers.
    """

    started: float
    took: float
    num_sequences: int
    num_tokens: int
    owners: Mapping[str, int]

    @property
    def started_ns(self) -> int:
        """When it began, in whole nanoseconds."""
        return int(self.started * 1e9)


class StepTrace:
    """What the decoder has done lately."""

    def __init__(self) -> None:
        self.busy_seconds = 0.0
        self._ring: deque[DecodeStep] = deque(maxlen=KEPT_STEPS)

    def add(self, step: DecodeStep) -> None:
        """Notes a step."""
        self._ring.append(step)
        self.busy_seconds += step.took
        _STEP_SECONDS.observe(step.took)
        _STEP_ROWS.observe(step.num_sequences)

    def last(self, limit: int, after_ns: int = 0) -> list[DecodeStep]:
        """Returns the last `limit` steps, those that began later than a Unix time in nanoseconds; newest last."""
        newest: list[DecodeStep] = []
        # Copied in one go: the other thread may append meanwhile.
        for step in reversed(self._ring.copy()):
            if len(newest) == limit or step.started_ns <= after_ns:
                break
            newest.append(step)
        return newest[::-1]
