"""Many tenants on many trainers, simulated: the real scheduler picks every pass, only computing takes made-up time.

Each trainer does what `treadle_trainer.device_loop` does: one pass at a time, filled by FairScheduler; optimizer steps
beside the passes, during which their run contributes nothing; a short patience for steps that are about to end. Users
send a step when the result of the one `window` before it has reached them. Events are in one heap, so a simulation is
the same every time.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from treadle.capacity import Speed, Usage
from treadle_trainer.device_loop import LEAST_PATIENCE_SECONDS, PATIENCE
from treadle_trainer.scheduler import FairScheduler, RunQueue, Waiting

Action = Callable[[], None]


class Clock:
    """Simulated time: actions in the order of their moments."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Action]] = []
        self._order = itertools.count()

    def after(self, seconds: float, action: Action) -> None:
        """Has something happen later."""
        heapq.heappush(self._events, (self.now + seconds, next(self._order), action))

    def run_until(self, end: float) -> None:
        """Lets time pass."""
        while self._events and self._events[0][0] <= end:
            self.now, _, action = heapq.heappop(self._events)
            action()
        self.now = end


@dataclass
class Run:
    """One user's run on its trainer."""

    name: str
    tenant: str
    usage: Usage
    trainer: Trainer
    num_waiting: int = 0
    stepping: bool = False
    num_steps: int = 0
    jitter: Callable[[], float] = lambda: 1.0

    def arrive(self) -> None:
        """A step of the user reaches the trainer."""
        self.num_waiting += 1
        self.trainer.consider()


@dataclass
class Trainer:
    """One device; busy while a pass or a step is under way."""

    clock: Clock
    speed: Speed
    runs: list[Run] = field(default_factory=list)
    busy_seconds: float = 0.0
    num_passes: int = 0
    num_picked: int = 0
    num_tokens: int = 0

    def __post_init__(self) -> None:
        """Sets its scheduler up as a trainer does."""
        self._scheduler: FairScheduler[Run] = FairScheduler(self.speed.max_tokens_per_pass)
        self.in_pass: Sequence[Run] = ()
        self._pass_seconds = 0.0
        self._num_working = 0
        self._since = 0.0
        self._patient_until: float | None = None

    def consider(self) -> None:
        """Begins a pass if there is work, unless steps that are about to end are waited for."""
        if self.in_pass:
            return
        waiting = [run for run in self.runs if run.num_waiting and not run.stepping]
        if not waiting:
            self._patient_until = None
            return
        if self._patient():
            return
        self._patient_until = None
        seconds = self.speed.target_pass_seconds - self.speed.fixed_seconds
        picked = self._scheduler.pick([self._queue(run) for run in waiting], seconds)
        tokens = sum(run.usage.tokens_per_step for run in picked)
        self.in_pass, self._pass_seconds = picked, self.speed.pass_seconds(tokens)
        self.num_passes += 1
        self.num_picked += len(picked)
        self.num_tokens += tokens
        self._work(1)
        self.clock.after(self._pass_seconds, lambda: self._end_pass(picked))

    def close(self) -> None:
        """Counts the work that is under way when the simulation ends."""
        if self._num_working:
            self.busy_seconds += self.clock.now - self._since
            self._since = self.clock.now

    def _queue(self, run: Run) -> RunQueue[Run]:
        tokens = run.usage.tokens_per_step
        # Behind a batch comes its step: one chunk at a time.
        return RunQueue(run.name, run.tenant, [Waiting(tokens, run, self.speed.seconds_per_token * tokens)])

    def _patient(self) -> bool:
        limit = max(PATIENCE * self._pass_seconds, LEAST_PATIENCE_SECONDS)
        soon = any(run.stepping and run.num_waiting and run.usage.step_seconds <= limit for run in self.runs)
        if not soon:
            return False
        if self._patient_until is None:
            self._patient_until = self.clock.now + limit
            self.clock.after(limit, self.consider)
        return self.clock.now < self._patient_until

    def _end_pass(self, picked: Sequence[Run]) -> None:
        self.in_pass = ()
        for run in picked:
            run.num_waiting -= 1
            run.stepping = True
            self._work(1)
            self.clock.after(run.usage.step_seconds, lambda run=run: self._end_step(run))
        self._work(-1)
        self.consider()

    def _end_step(self, run: Run) -> None:
        run.stepping = False
        run.num_steps += 1
        self._work(-1)
        self.clock.after(run.usage.away_seconds * run.jitter(), run.arrive)
        self.consider()

    def _work(self, change: int) -> None:
        if not self._num_working:
            self._since = self.clock.now
        self._num_working += change
        if not self._num_working:
            self.busy_seconds += self.clock.now - self._since


@dataclass(frozen=True)
class Outcome:
    """What a simulation came to, over all trainers that had a run."""

    utilisation: float
    runs_per_pass: float
    steps_per_second: float
    tokens_per_second: float
    least_steps: int
    """Of the user who got fewest."""
    num_picks: int


def simulate(
    speed: Speed,
    usage: Usage,
    places: Sequence[int],
    seconds: float,
    num_trainers: int,
    warm_up: float = 2.0,
    jitter: float = 0.2,
) -> Outcome:
    """Lets a user of a tenant of its own run on trainer `places[i]` each; counts after the warm-up.

    Users begin spread over one cycle, and are away for up to `jitter` longer or shorter, so that they do not march in
    step.
    """
    randomness = random.Random(1)
    clock = Clock()
    trainers = [Trainer(clock, speed) for _ in range(num_trainers)]
    runs: deque[Run] = deque()
    cycle = usage.away_seconds + speed.pass_seconds(usage.tokens_per_step) + usage.step_seconds
    for number, place in enumerate(places):
        run = Run(f"run-{number}", f"tenant-{number}", usage, trainers[place])
        run.jitter = lambda: randomness.uniform(1.0 - jitter, 1.0 + jitter)
        trainers[place].runs.append(run)
        runs.append(run)
        # The golden ratio spreads any number of users evenly.
        begin = (number * 0.6180339887) % 1.0 * cycle
        for _ in range(usage.window):
            clock.after(begin, run.arrive)
    clock.run_until(warm_up)
    used = [trainer for trainer in trainers if trainer.runs]
    for trainer in used:
        trainer.close()
    before = [(t.busy_seconds, t.num_passes, t.num_picked, t.num_tokens) for t in used]
    steps = [run.num_steps for run in runs]
    clock.run_until(warm_up + seconds)
    for trainer in used:
        trainer.close()
    after = [(t.busy_seconds, t.num_passes, t.num_picked, t.num_tokens) for t in used]
    busy, passes, picked, tokens = (
        sum(late[column] - early[column] for early, late in zip(before, after, strict=True)) for column in range(4)
    )
    done = [run.num_steps - early for run, early in zip(runs, steps, strict=True)]
    return Outcome(
        busy / (seconds * len(used)),
        picked / max(passes, 1),
        sum(done) / seconds,
        tokens / seconds,
        min(done),
        int(passes),
    )
