"""Simulated trainers that hand runs to each other: the real demand, plan and acceptance over made-up computing.

Adds to `bench.simulation` what `treadle_trainer.rebalancer` does: trainers report loads, look at each other, offer
runs, and a run that moves stands still for a moment. Settings are the trainer's defaults.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from bench.simulation import Clock, Run, Trainer
from treadle.capacity import Speed, Usage
from treadle_trainer.balance import Movable, Peer, improves, plan
from treadle_trainer.demand import Demand
from treadle_trainer.settings import TrainerSettings

_MOVES_AT_ONCE: Final = 4
_RETRY_SECONDS: Final = 0.01


def _default(name: str) -> float:
    return float(TrainerSettings.model_fields[name].default)


class MovingRun(Run):
    """A run whose demand is measured."""

    came_at = 0.0
    demand = Demand(0.0)

    def arrive(self) -> None:
        """A step of the user reaches the service."""
        self.demand.begin(self.trainer.clock.now)
        super().arrive()


class MovingTrainer(Trainer):
    """A trainer that knows its load."""

    listed = 0.0
    """Its load as the others know it."""
    own: list[MovingRun]
    """Its runs, and those that are on their way to it."""

    @property
    def load(self) -> float:
        """Its load as it knows it."""
        return sum(run.demand.value(self.clock.now) for run in self.own)

    def _end_pass(self, picked: Sequence[Run]) -> None:
        tokens = sum(run.usage.tokens_per_step for run in picked)
        for run in picked:
            if isinstance(run, MovingRun):
                run.demand.worked(self._pass_seconds * run.usage.tokens_per_step / tokens, self.clock.now)
        super()._end_pass(picked)

    def _end_step(self, run: Run) -> None:
        super()._end_step(run)
        if isinstance(run, MovingRun):
            run.demand.worked(run.usage.step_seconds, self.clock.now)
            if not run.num_waiting:
                run.demand.end(self.clock.now)


@dataclass
class Fleet:
    """Trainers of one base and the users on them."""

    speed: Speed
    num_trainers: int
    pause: float
    """How long a run that moves stands still."""
    clock: Clock = field(default_factory=Clock)
    num_moves: int = 0

    def __post_init__(self) -> None:
        """Makes the trainers; each begins to report and to look at a moment of its own."""
        self.trainers = [MovingTrainer(self.clock, self.speed) for _ in range(self.num_trainers)]
        self.runs: list[MovingRun] = []
        self._random = random.Random(1)
        period, look = _default("lease_seconds") / 3, _default("rebalance_seconds")
        for trainer in self.trainers:
            trainer.own = []
            self.clock.after(self._random.uniform(0, period), lambda t=trainer: self._report(t, period))
            self.clock.after(self._random.uniform(0, look), lambda t=trainer: self._look(t, look))

    def add(self, usage: Usage, place: int) -> None:
        """Has a user with a run on a trainer begin."""
        number, trainer = len(self.runs), self.trainers[place]
        run = MovingRun(f"run-{number}", f"tenant-{number}", usage, trainer)
        run.jitter = lambda: self._random.uniform(0.8, 1.2)
        run.demand, run.came_at = Demand(self.clock.now), self.clock.now
        trainer.runs.append(run)
        trainer.own.append(run)
        self.runs.append(run)
        for _ in range(usage.window):
            self.clock.after(self._random.uniform(0, 0.5), run.arrive)

    def watch(self, seconds: float) -> list[float]:
        """Lets time pass; returns the steps per second of each run meanwhile."""
        before = [run.num_steps for run in self.runs]
        self.clock.run_until(self.clock.now + seconds)
        return [(run.num_steps - early) / seconds for run, early in zip(self.runs, before, strict=True)]

    def _report(self, trainer: MovingTrainer, period: float) -> None:
        trainer.listed = trainer.load
        self.clock.after(period, lambda: self._report(trainer, period))

    def _look(self, trainer: MovingTrainer, period: float) -> None:
        gap, since = _default("rebalance_gap"), self.clock.now - _default("rebalance_stay_seconds")
        runs = {run.name: run for run in trainer.own if run.came_at <= since}
        ready = [Movable(name, run.demand.value(self.clock.now)) for name, run in runs.items()]
        peers = [Peer(str(n), "", one.listed) for n, one in enumerate(self.trainers) if one is not trainer]
        for move in plan(trainer.load, ready, peers, gap, _MOVES_AT_ONCE):
            other, run = self.trainers[int(move.peer.worker)], runs[move.run.run]
            if improves(move.load, other.load, move.run.demand, gap):
                trainer.own.remove(run)
                run.came_at = self.clock.now
                other.own.append(run)
                self.num_moves += 1
                trainer.runs.remove(run)  # Nothing of it begins here any more.
                self._hand_over(run, other)
        self.clock.after(period, lambda: self._look(trainer, period))

    def _hand_over(self, run: MovingRun, other: MovingTrainer) -> None:
        """Brings a run to its new trainer a moment after what had begun on the old one has ended."""
        if run.stepping or run in run.trainer.in_pass:
            self.clock.after(_RETRY_SECONDS, lambda: self._hand_over(run, other))
            return
        run.trainer = other

        def arrive() -> None:
            other.runs.append(run)
            other.consider()

        self.clock.after(self.pause, arrive)
