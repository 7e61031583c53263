"""How many trainers a load needs, how busy they are, what they hold in memory: arithmetic for `treadle plan`.

A trainer runs one pass after the other; a pass costs a + b T over its T positions and is shared by the runs whose work
waits when it begins. A user's step is a batch (a pass) and an optimizer step (beside the passes of others); the next
one arrives a round trip later, unless steps are queued ahead. `python -m bench capacity` holds the formulas against a
simulation of the trainer's real scheduler, and both against a real trainer. Knows no wire and no clock.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

BYTES_PER_PARKED_PARAMETER: Final = 12
"""float32 weights and two moments, in host memory."""
BYTES_PER_ACTIVE_PARAMETER: Final = 16
"""The same and a gradient, on the device while the run works."""
_ROUNDS: Final = 200
_DAMPING: Final = 0.5


@dataclass(frozen=True, slots=True)
class Speed:
    """What a pass costs on one trainer, and how long its passes should be; as `treadle worker list` has it."""

    fixed_seconds: float
    seconds_per_token: float
    target_pass_seconds: float = 0.25
    max_tokens_per_pass: int = 65_536

    def pass_seconds(self, num_tokens: float) -> float:
        """Returns how long a pass over so many positions takes."""
        return self.fixed_seconds + self.seconds_per_token * num_tokens


@dataclass(frozen=True, slots=True)
class Usage:
    """What one user does: steps of so many tokens, `window` of them in flight, a round trip and own work between."""

    tokens_per_step: int
    round_trip_seconds: float
    window: int = 1
    own_seconds: float = 0.0
    step_seconds: float = 0.002
    """An optimizer step."""

    @property
    def away_seconds(self) -> float:
        """Between a result's departure and the arrival of what its user sends for it."""
        return self.round_trip_seconds + self.own_seconds


@dataclass(frozen=True, slots=True)
class Steady:
    """A trainer that serves some users, in the long run."""

    utilisation: float
    """Share of time with a pass or a step under way."""
    runs_per_pass: float
    steps_per_second: float
    """Of all its users together."""
    seconds_per_step: float
    """From one of a user's steps to its next."""


def steady_state(speed: Speed, usage: Usage, num_users: float) -> Steady:
    """Returns what becomes of one trainer that serves `num_users` users of a kind.

    Users who queue enough ahead are always there: passes follow each other, each with as many runs as fit. Those who
    wait are away for a time Z after each step. A pass of P seconds collects each of the users who are away with the
    probability P / Z; if it collected nobody, the trainer idles until the first comes back. The number of runs k in a
    pass, and so P, follow as a fixed point.
    """
    if num_users <= 0:
        return Steady(0.0, 0.0, 0.0, math.inf)
    most = _most_runs(speed, usage)
    alone = speed.pass_seconds(usage.tokens_per_step)
    # With w steps in flight, w of them are done in each round of a step and the way to its next.
    busy = alone + usage.step_seconds
    away = max(0.0, (usage.away_seconds + busy) / usage.window - busy)
    if num_users <= 1:
        cycle = busy + away
        return Steady(num_users * busy / cycle, 1.0, num_users / cycle, cycle)
    runs = 1.0
    for _ in range(_ROUNDS):
        seconds = speed.pass_seconds(usage.tokens_per_step * runs)
        collected, nobody, _ = _collected(num_users, runs, seconds, away + usage.step_seconds)
        found = min(most, max(1.0, collected / (1.0 - nobody) if nobody < 1.0 else 1.0))
        runs += _DAMPING * (found - runs)
    seconds = speed.pass_seconds(usage.tokens_per_step * runs)
    _, nobody, gap = _collected(num_users, runs, seconds, away + usage.step_seconds)
    # Steps are beside the passes of others; where a gap follows, they are part of the busy time.
    beside = min(usage.step_seconds, gap)
    cycle = seconds + nobody * gap
    # Nobody goes faster in company than alone.
    swiftest = num_users / (busy + away)
    rate = min(runs / cycle, swiftest)
    utilisation = min((seconds + nobody * beside) / cycle, busy * swiftest)
    return Steady(min(1.0, utilisation), runs, rate, num_users / rate)


def _most_runs(speed: Speed, usage: Usage) -> float:
    by_time = (speed.target_pass_seconds - speed.fixed_seconds) / (speed.seconds_per_token * usage.tokens_per_step)
    return max(1.0, math.floor(min(by_time, speed.max_tokens_per_pass / usage.tokens_per_step)))


def _collected(num_users: float, runs: float, seconds: float, away: float) -> tuple[float, float, float]:
    """Returns (users whose work waits when a pass ends, probability of none, seconds until the next comes)."""
    others = max(0.0, num_users - runs)
    if away <= seconds:
        # Whoever is not in the pass is back before it ends; those in it come back during the next.
        return (others if others >= 1.0 else num_users), (0.0 if others >= 1.0 else 1.0), away
    share = seconds / away
    nobody = (1.0 - share) ** others
    # The first of those who are away, spread over the rest of their time; those of this pass are away for all of it.
    gap = min(away, (away - seconds) / (others + 1.0)) if others > 0 else away
    return others * share, nobody, gap


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes that a run and a base take."""

    idle_run_bytes: int
    resident_run_bytes: int
    base_bytes: int


def memory_of(num_parameters: int, bytes_per_parameter: float, adapter_parameters: int) -> Memory:
    """Returns what is held; an idle run is in its snapshot alone after it was pushed out, else in host memory."""
    return Memory(
        adapter_parameters * BYTES_PER_PARKED_PARAMETER,
        adapter_parameters * BYTES_PER_ACTIVE_PARAMETER,
        int(num_parameters * bytes_per_parameter),
    )


def adapter_parameters(num_parameters: int, rank: int) -> int:
    """Returns about how many parameters an adapter of all linears has.

    A decoder of L layers of width h has about 12 L h^2 parameters, of which h is about 64 L wide; its linears have
    inputs and outputs of about 18 h a layer, each with `rank` parameters.
    """
    width = (64.0 * num_parameters / 12.0) ** (1.0 / 3.0)
    return int(18.0 * width * (width / 64.0) * rank)


def trainers_needed(speed: Speed, usage: Usage, num_users: int, slowdown: float = 1.5) -> int:
    """Returns the fewest trainers on which a step takes at most `slowdown` times what it takes a user alone."""
    alone = steady_state(speed, usage, 1).seconds_per_step
    low, high = 1, max(1, num_users)
    while low < high:
        middle = (low + high) // 2
        if steady_state(speed, usage, num_users / middle).seconds_per_step <= slowdown * alone:
            high = middle
        else:
            low = middle + 1
    return low
