"""Who shares the next pass: deficit round robin over tenants, in tokens, under the pass's budget. Pure.

Each tenant with waiting work earns the same number of tokens per round; within a tenant, runs take turns; within a
run, chunks go strictly in order. A tenant that floods the queue therefore delays nobody else by more than one pass.
Knows nothing of what a chunk holds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

QUANTUM_TOKENS: Final = 1024
"""Tokens that a tenant earns per round: about one chunk."""

ChunkT = TypeVar("ChunkT")


@dataclass(frozen=True, slots=True)
class Waiting(Generic[ChunkT]):
    """A chunk that could go into the next pass."""

    num_tokens: int
    chunk: ChunkT


@dataclass(frozen=True, slots=True)
class RunQueue(Generic[ChunkT]):
    """The waiting chunks of one run, in order."""

    run: str
    tenant: str
    chunks: Sequence[Waiting[ChunkT]]


class FairScheduler(Generic[ChunkT]):
    """Picks chunks for one pass after the other; remembers what each tenant is owed."""

    def __init__(self, max_tokens: int, quantum: int = QUANTUM_TOKENS) -> None:
        """Fills passes of at most `max_tokens`; a longer chunk goes alone."""
        self._max_tokens = max_tokens
        self._quantum = quantum
        self._deficits: dict[str, int] = {}
        self._turns: deque[str] = deque()
        self._run_turns: dict[str, deque[str]] = {}

    def pick(self, queues: Sequence[RunQueue[ChunkT]]) -> list[ChunkT]:
        """Returns the chunks of the next pass, each run's together and in order; empty only if nothing waits."""
        by_run = {queue.run: deque(queue.chunks) for queue in queues if queue.chunks}
        tenants: dict[str, list[str]] = {}
        for queue in queues:
            if queue.chunks:
                tenants.setdefault(queue.tenant, []).append(queue.run)
        self._update_turns(tenants)
        picked: dict[str, list[ChunkT]] = {}
        room, full = self._max_tokens, False
        while by_run and not full:
            for _ in range(len(self._turns)):
                tenant = self._turns[0]
                room, full = self._serve(tenant, by_run, picked, room)
                if full and room > 0:
                    # The tenant's next chunk did not fit: it keeps its turn, and begins the next pass.
                    break
                self._turns.rotate(-1)
                if full:
                    break
        return [chunk for chunks in picked.values() for chunk in chunks]

    def _serve(
        self, tenant: str, by_run: dict[str, deque[Waiting[ChunkT]]], picked: dict[str, list[ChunkT]], room: int
    ) -> tuple[int, bool]:
        """Gives one tenant its turn; returns the room left and whether the pass is full."""
        turns = self._run_turns[tenant]
        if not any(run in by_run for run in turns):
            return room, False
        self._deficits[tenant] = self._deficits.get(tenant, 0) + self._quantum
        while run := next((run for run in turns if run in by_run), None):
            waiting = by_run[run][0]
            first = room == self._max_tokens
            if waiting.num_tokens > room and not first:
                # This turn's credit comes again with the turn.
                self._deficits[tenant] -= self._quantum
                return room, True
            if waiting.num_tokens > self._deficits[tenant]:
                return room, False
            self._deficits[tenant] -= waiting.num_tokens
            room -= waiting.num_tokens
            picked.setdefault(run, []).append(waiting.chunk)
            by_run[run].popleft()
            if not by_run[run]:
                del by_run[run]
            # The run goes behind its tenant's others.
            turns.remove(run)
            turns.append(run)
            if room <= 0:
                return room, True
        # Nothing waits any more: credit is not saved up for later.
        self._deficits[tenant] = 0
        return room, False

    def _update_turns(self, tenants: Mapping[str, Sequence[str]]) -> None:
        self._turns = deque([tenant for tenant in self._turns if tenant in tenants])
        self._turns.extend(tenant for tenant in tenants if tenant not in self._turns)
        self._deficits = {tenant: deficit for tenant, deficit in self._deficits.items() if tenant in tenants}
        kept: dict[str, deque[str]] = {}
        for tenant, runs in tenants.items():
            turns = deque(run for run in self._run_turns.get(tenant, ()) if run in runs)
            turns.extend(run for run in runs if run not in turns)
            kept[tenant] = turns
        self._run_turns = kept
