"""Who shares the next pass: deficit round robin over tenants, in tokens, under the pass's budget. Pure.

Each tenant with waiting work earns the same number of tokens per round; within a tenant, runs take turns; within a
run, chunks go strictly in order. A pass is full when the next chunk would make it too large or take it beyond its
target duration; small chunks of other tenants may still ride along, on credit that they pay back. So a tenant that
floods the queue delays nobody else by more than one pass. Knows nothing of what a chunk holds.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

QUANTUM_TOKENS: Final = 128
"""Tokens that a tenant earns per round: less than a chunk, so that no turn lasts longer than a pass or two."""

ChunkT = TypeVar("ChunkT")


@dataclass(frozen=True, slots=True)
class Waiting(Generic[ChunkT]):
    """A chunk that could go into the next pass, and the seconds that it would add (0: unknown)."""

    num_tokens: int
    chunk: ChunkT
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class RunQueue(Generic[ChunkT]):
    """The waiting chunks of one run, in order."""

    run: str
    tenant: str
    chunks: Sequence[Waiting[ChunkT]]


class _Pass(Generic[ChunkT]):
    """The pass being filled, and what still waits for it."""

    def __init__(self, queues: Sequence[RunQueue[ChunkT]], max_tokens: int, max_seconds: float) -> None:
        self.by_run = {queue.run: deque(queue.chunks) for queue in queues if queue.chunks}
        self.picked: dict[str, list[ChunkT]] = {}
        self.num_taken = 0
        self._tokens, self._seconds = max_tokens, max_seconds

    def fits(self, waiting: Waiting[ChunkT]) -> bool:
        """Tells whether a chunk has room; the first always has."""
        return not self.picked or (waiting.num_tokens <= self._tokens and waiting.seconds <= self._seconds)

    def take(self, run: str) -> None:
        """Puts a run's next chunk into the pass."""
        waiting = self.by_run[run].popleft()
        if not self.by_run[run]:
            del self.by_run[run]
        self.picked.setdefault(run, []).append(waiting.chunk)
        self._tokens -= waiting.num_tokens
        self._seconds -= waiting.seconds
        self.num_taken += 1


class FairScheduler(Generic[ChunkT]):
    """Picks chunks for one pass after the other; remembers what each tenant is owed."""

    def __init__(self, max_tokens: int, quantum: int = QUANTUM_TOKENS) -> None:
        """Fills passes of at most `max_tokens`; a longer chunk goes alone."""
        self._max_tokens = max_tokens
        self._quantum = quantum
        self._deficits: dict[str, int] = {}
        self._turns: deque[str] = deque()
        self._run_turns: dict[str, deque[str]] = {}

    def pick(self, queues: Sequence[RunQueue[ChunkT]], max_seconds: float = math.inf) -> list[ChunkT]:
        """Returns the chunks of the next pass, each run's together and in order; empty only if nothing waits.

        Beyond the first chunk, the chunks add at most `max_seconds`.
        """
        tenants: dict[str, list[str]] = {}
        for queue in queues:
            if queue.chunks:
                tenants.setdefault(queue.tenant, []).append(queue.run)
        self._update_turns(tenants)
        filling = _Pass(queues, self._max_tokens, max_seconds)
        # Credit of turns since the last chunk was taken, which came to nothing yet.
        unused: list[tuple[str, int]] = []
        while filling.by_run:
            tenant, before, taken = self._turns[0], self._deficits.get(self._turns[0], 0), filling.num_taken
            if self._serve(tenant, filling, self._quantum):
                # Its next chunk did not fit. The turns that led to it come again in the next pass: credit that is
                # saved up for a chunk of later would let it pass by whoever comes meanwhile.
                self._take_back(unused)
                for other in list(self._turns):
                    self._serve(other, filling, 0)
                break
            self._turns.rotate(-1)
            if filling.num_taken > taken:
                unused.clear()
            else:
                unused.append((tenant, self._deficits[tenant] - before))
        return [chunk for chunks in filling.picked.values() for chunk in chunks]

    def _take_back(self, turns: Sequence[tuple[str, int]]) -> None:
        """Makes the last turns not have been."""
        self._turns.rotate(len(turns))
        for tenant, credit in turns:
            self._deficits[tenant] -= credit

    def _serve(self, tenant: str, filling: _Pass[ChunkT], quantum: int) -> bool:
        """Gives one tenant its turn with so much new credit; returns whether a chunk that it could pay did not fit.

        Without new credit it may run up a debt of one quantum.
        """
        turns = self._run_turns[tenant]
        floor = 0 if quantum else -self._quantum
        self._deficits[tenant] = self._deficits.get(tenant, 0) + quantum
        while run := next((run for run in turns if run in filling.by_run), None):
            waiting = filling.by_run[run][0]
            if self._deficits[tenant] - waiting.num_tokens < floor:
                return False
            if not filling.fits(waiting):
                # The tenant keeps its turn, and its credit comes again with it.
                self._deficits[tenant] -= quantum
                return True
            self._deficits[tenant] -= waiting.num_tokens
            filling.take(run)
            # The run goes behind its tenant's others.
            turns.remove(run)
            turns.append(run)
        # Nothing waits any more: credit is not saved up for later. A debt stays while others keep the tenant waiting.
        self._deficits[tenant] = min(self._deficits[tenant], 0)
        return False

    def _update_turns(self, tenants: Mapping[str, list[str]]) -> None:
        # Looked up in sets: with ten thousand tenants a look through the turns would take longer than the pass.
        known = set(self._turns)
        self._turns = deque(tenant for tenant in self._turns if tenant in tenants)
        self._turns.extend(tenant for tenant in tenants if tenant not in known)
        self._deficits = {tenant: deficit for tenant, deficit in self._deficits.items() if tenant in tenants}
        kept: dict[str, deque[str]] = {}
        for tenant, runs in tenants.items():
            before = self._run_turns.get(tenant, deque())
            if list(before) != runs:
                waiting, known = set(runs), set(before)
                before = deque(run for run in before if run in waiting)
                before.extend(run for run in runs if run not in known)
            kept[tenant] = before
        self._run_turns = kept
