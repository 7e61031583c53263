"""A ring of the last decode steps and the time spent in all of them.

Written by the decoder's thread, read by any other. Knows nothing else.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final

KEPT_STEPS: Final = 10_000


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """One step: when it began (Unix time), how long it took, both in seconds; its sequences and drawn tokens."""

    started: float
    took: float
    num_sequences: int
    num_tokens: int


class StepTrace:
    """What the decoder has done lately."""

    def __init__(self) -> None:
        self.busy_seconds = 0.0
        self._ring: deque[DecodeStep] = deque(maxlen=KEPT_STEPS)

    def add(self, step: DecodeStep) -> None:
        """Notes a step."""
        self._ring.append(step)
        self.busy_seconds += step.took

    def last(self, limit: int) -> list[DecodeStep]:
        """Returns the last `limit` steps, newest last."""
        # Copied in one go: the other thread may append meanwhile.
        return list(self._ring.copy())[-limit:]
