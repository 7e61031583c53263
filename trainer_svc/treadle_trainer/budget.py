"""What passes cost, and how much one may hold. Pure arithmetic: no clock, no torch.

The cost comes from the probe (or there is none), the memory from the machine. Two limits follow: how many tokens a
pass may hold, which is also the longest sequence, and how long one should take. Knows nothing of who shares a pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

LEAST_TOKENS: Final = 1024
"""A pass must hold one chunk, whatever it costs."""
DEFAULT_TOKENS: Final = 4096
"""Where nothing was measured."""
MOST_TOKENS: Final = 65536
MEMORY_SHARE: Final = 0.25
"""Share of the device's memory that a pass may take."""
_PACE_WEIGHT: Final = 0.1
_LEAST_PACE: Final = 0.25
_MOST_PACE: Final = 8.0


@dataclass(frozen=True, slots=True)
class PassCost:
    """Seconds of a training pass as fixed + per_token T + per_square sum(L^2), and bytes that it holds per token."""

    fixed_seconds: float
    seconds_per_token: float
    seconds_per_square: float
    bytes_per_token: int

    def seconds(self, lengths_R: NDArray[np.int64]) -> float:
        """Returns what R sequences of such lengths add to a pass."""
        return self.seconds_per_token * float(lengths_R.sum()) + self.seconds_per_square * float(lengths_R @ lengths_R)

    def tokens_that_fit(self, memory_bytes: int) -> int:
        """Returns the largest power of two of tokens whose pass fits its share of so much memory.

        Rounded so coarsely that it is the same at each start on one machine: it decides which data are too long.
        """
        fits = int(MEMORY_SHARE * memory_bytes) // max(1, self.bytes_per_token)
        return max(LEAST_TOKENS, min(MOST_TOKENS, 1 << max(0, fits.bit_length() - 1)))


@dataclass(frozen=True, slots=True)
class PassBudget:
    """What one pass may hold: tokens at most, and about how many seconds; without a cost the tokens alone count."""

    max_tokens: int
    target_seconds: float = 0.0
    cost: PassCost | None = None

    def seconds(self, lengths_R: NDArray[np.int64]) -> float:
        """Returns what R sequences of such lengths add to a pass; 0 without a cost."""
        return 0.0 if self.cost is None else self.cost.seconds(lengths_R)

    @property
    def fixed_seconds(self) -> float:
        """What any pass takes; 0 without a cost."""
        return 0.0 if self.cost is None else self.cost.fixed_seconds


def choose_budget(max_tokens: int, target_seconds: float, cost: PassCost | None, memory_bytes: int) -> PassBudget:
    """Returns the budget of a trainer; `max_tokens` 0 takes what fits the memory, or a default without a cost."""
    if not max_tokens:
        max_tokens = DEFAULT_TOKENS if cost is None else cost.tokens_that_fit(memory_bytes)
    return PassBudget(max_tokens, target_seconds, cost)


class Pace:
    """How much longer passes take than the cost says: adapters of high rank, busy neighbours on the machine."""

    def __init__(self) -> None:
        self.factor = 1.0
        """Seconds taken per second expected, over the last passes."""

    def learn(self, expected: float, took: float) -> None:
        """Takes one pass into account; one that nothing was expected of teaches nothing."""
        if expected > 0.0:
            ratio = min(max(took / expected, _LEAST_PACE), _MOST_PACE)
            self.factor += _PACE_WEIGHT * (ratio - self.factor)
