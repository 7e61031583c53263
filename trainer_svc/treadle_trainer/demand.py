"""How much of a device one run would keep busy if it had one to itself: what a trainer's load is made of.

A run's owner is away between a result and the next operation, and the device could do nothing for it then. So what the
run wants is used / (used + away), of the device's time spent on it and the time that it had nothing to do here. Time in
which its operations wait for others counts as neither: that makes the figure the same wherever the run is and whoever
is there with it, so that moving runs by it comes to an end. A run whose owner queues ahead is never away and wants 1.

Both sums fade over WINDOW_SECONDS. Pure: the clock is passed in.
"""

from __future__ import annotations

import math
from typing import Final

WINDOW_SECONDS: Final = 30.0
"""What is so old counts for a third."""
_KNOWN_SECONDS: Final = 5.0
"""How much observation what is assumed at first is worth."""


class Demand:
    """The demand of one run, from when it came."""

    def __init__(self, now: float, assumed: float = 1.0) -> None:
        """Begins without work; until more is known, the demand is `assumed`: by default all there may be."""
        self._updated = now
        self._working = False
        self._used = self._away = 0.0
        self.assume(assumed)

    def assume(self, demand: float) -> None:
        """Forgets what was seen; the demand is `demand` until more is."""
        self._used, self._away = _KNOWN_SECONDS * demand, _KNOWN_SECONDS * (1.0 - demand)

    def begin(self, now: float) -> None:
        """An operation has come; there may be others."""
        self._fade(now)
        self._working = True

    def worked(self, seconds: float, now: float) -> None:
        """The device has spent so much time on the run."""
        self._fade(now)
        self._used += seconds

    def end(self, now: float) -> None:
        """The last operation has ended."""
        self._fade(now)
        self._working = False

    def value(self, now: float) -> float:
        """Returns the demand, from 0 (idle) to 1."""
        self._fade(now)
        total = self._used + self._away
        # What waits for very long has faded away altogether.
        return self._used / total if total > 1e-9 else float(self._working)

    def _fade(self, now: float) -> None:
        factor = math.exp((self._updated - now) / WINDOW_SECONDS)
        self._used *= factor
        self._away *= factor
        if not self._working:
            self._away += WINDOW_SECONDS * (1.0 - factor)
        self._updated = now
