"""Which runs a trainer hands to which others so that their loads become even: pure functions, and what was promised.

A trainer looks at the others of its base and offers runs to the one with the least load. Figures in the workers' list
are seconds old, so that one decides by its own figures of that moment whether it takes the run, and counts in at once
what it takes. Both sides ask `improves`. An accepted move of demand x from load a to load b makes the sum of squares of
all loads smaller by 2 x (a - b - x), at least x times the least difference; so with demands that do not change, the
demand that moves in all is at most that sum over the least difference, in whatever order and at whatever moments
trainers decide: loads cannot swing. Where demands change, a run stays for a while where it came. Knows no clock and no
wire.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

LEAST_DEMAND: Final = 0.005
"""A run that wants less of a device is not worth its move."""
_SHARE: Final = 0.1
PROMISED_SECONDS: Final = 60.0
"""How long a run is expected after it was accepted."""


@dataclass(frozen=True, slots=True)
class Peer:
    """Another trainer of the same base, as the workers' list has it."""

    worker: str
    address: str
    load: float


@dataclass(frozen=True, slots=True)
class Movable:
    """A run that may move: what it wants of a device, and the size of its state."""

    run: str
    demand: float
    num_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Move:
    """A run and whom it is to be offered to."""

    run: Movable
    peer: Peer
    load: float
    """What the giver's load is before it."""


def improves(load: float, other: float, demand: float, least_gap: float) -> bool:
    """Tells whether a run of so much demand should go from a trainer with `load` to one with `other`.

    The loads must differ by `least_gap`, large ones by a tenth of the larger. A run of more than half of the difference
    turns it around: it goes only if the smaller load stays clearly below what the larger one was, by half of what the
    loads must differ by. So a run that is all the load of its trainer never goes.
    """
    gap = load - other
    needed = max(least_gap, _SHARE * load)
    return demand >= LEAST_DEMAND and gap >= needed and (demand <= gap / 2 or gap - demand >= needed / 2)


def plan(load: float, runs: Sequence[Movable], peers: Sequence[Peer], least_gap: float, most: int) -> list[Move]:
    """Returns the moves, at most so many, that bring loads nearest to even, the best first.

    Each goes to the peer whose load is least by then; of runs that bring as much the one with the smaller state.

    Args:
        load: the load of this trainer.
        runs: those of its runs that may move.
        peers: the others.
        least_gap: least difference of loads for which runs move.
        most: how many runs move at once.
    """
    left, moves = list(runs), list[Move]()
    loads = {peer.worker: peer.load for peer in peers}
    while len(moves) < most and peers:
        peer = min(peers, key=lambda peer: (loads[peer.worker], peer.worker))
        gap = load - loads[peer.worker]
        fitting = [run for run in left if improves(load, loads[peer.worker], run.demand, least_gap)]
        if not fitting:
            break
        best = min(fitting, key=lambda run: (abs(gap / 2 - run.demand), run.num_bytes, run.run))
        moves.append(Move(best, peer, load))
        left.remove(best)
        load -= best.demand
        loads[peer.worker] += best.demand
    return moves


class Expected:
    """Runs that were accepted and have not come yet; the clock is passed in."""

    def __init__(self) -> None:
        self._promises: dict[str, tuple[Movable, float]] = {}

    def promise(self, run: Movable, now: float) -> None:
        """Counts a run in from now on."""
        self._promises[run.run] = (run, now + PROMISED_SECONDS)

    def arrived(self, run: str) -> float | None:
        """Takes note that a run is here, or will not come; returns its demand if it was expected."""
        promised = self._promises.pop(run, None)
        return None if promised is None else promised[0].demand

    def load(self, now: float) -> float:
        """Returns the demand of all that is expected."""
        return sum(run.demand for run in self._waited_for(now))

    def num_bytes(self, now: float) -> int:
        """Returns the memory that all that is expected will take."""
        return sum(run.num_bytes for run in self._waited_for(now))

    def _waited_for(self, now: float) -> list[Movable]:
        self._promises = {name: promise for name, promise in self._promises.items() if promise[1] > now}
        return [run for run, _ in self._promises.values()]
