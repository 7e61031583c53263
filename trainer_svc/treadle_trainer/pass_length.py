"""How long the next pass should take at most: short enough that whoever brings little does not wait for much.

A pass is not interrupted, so a tenant with one small operation at a time waits for the rest of the pass under way and
then for its own. Under ideal sharing by N tenants (generalized processor sharing) an operation of d seconds takes no
more than N d. So passes take about N times what the lightest tenant brings, while others bring more. Tenants count
from a moment ago, because a light one is away between a result and its next operation. Chunks are not cut for this: a
pass holds one at least. Pure: the clock is passed in.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final, NamedTuple

RECENT_SECONDS: Final = 1.0
"""How long a tenant counts after work of its own was last seen."""
FIXED_SHARE: Final = 0.125
"""Largest share of a pass that its fixed cost may be made by keeping it short."""


class _Seen(NamedTuple):
    at: float
    seconds: float


class PassLength:
    """What each tenant brought lately, and the length of a pass that follows."""

    def __init__(self, fixed_seconds: float) -> None:
        """`fixed_seconds` is what any pass takes, however little it holds."""
        self._least = fixed_seconds * (1.0 / FIXED_SHARE - 1.0)
        self._seen: dict[str, _Seen] = {}

    def limit(self, waiting: Iterable[tuple[str, float]], now: float, most: float) -> float:
        """Returns the seconds that the next pass's chunks may take, `most` where nobody brings less than others.

        `waiting` is what waits as (tenant, seconds), several times for a tenant of several runs.
        """
        brought: dict[str, float] = {}
        for tenant, seconds in waiting:
            brought[tenant] = brought.get(tenant, 0.0) + seconds
        for tenant, seconds in brought.items():
            self._seen[tenant] = _Seen(now, max(seconds, self._faded(tenant, now)))
        self._seen = {tenant: seen for tenant, seen in self._seen.items() if now - seen.at < RECENT_SECONDS}
        lightest = min((seen.seconds for seen in self._seen.values()), default=0.0)
        # Without a measured cost all seconds are 0, and nobody is known to bring less than others.
        if len(self._seen) < 2 or not lightest:
            return most
        return min(most, max(self._least, len(self._seen) * lightest))

    def _faded(self, tenant: str, now: float) -> float:
        """Returns what a tenant brought at most, less the longer ago: a batch is seen in pieces, its rest is small."""
        seen = self._seen.get(tenant)
        return 0.0 if seen is None else seen.seconds * math.exp((seen.at - now) / RECENT_SECONDS)
