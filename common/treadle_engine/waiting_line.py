"""Who gets the next place: the owner who was served the fewest tokens (virtual token counters).

Every token that is read or drawn is charged to its owner. Who comes back after a pause starts level with the least
served of those who are there, so that nobody saves turns up. The counters are those of Sheng et al., "Fairness in
Serving Large Language Models" (2024), with all tokens weighing the same. Knows nothing of what a place is.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

T = TypeVar("T", bound="Waiting")


class Waiting(Protocol):
    """What stands in line."""

    @property
    def owner(self) -> str:
        """Whoever shares one counter."""
        ...


class WaitingLine(Generic[T]):
    """One queue per owner."""

    def __init__(self) -> None:
        """Start empty."""
        self._queues: dict[str, deque[T]] = {}
        self._served: dict[str, float] = {}
        self._held: Counter[str] = Counter()

    def add(self, item: T, *, front: bool = False) -> None:
        """Put an item at the end of its owner's queue, or at its front."""
        owner = item.owner
        if owner not in self._queues and not self._held[owner]:
            present = [self._served[other] for other in {*self._queues, *self._held.keys()} if other in self._served]
            self._served[owner] = max(self._served.get(owner, 0.0), min(present, default=0.0))
        queue = self._queues.setdefault(owner, deque())
        if front:
            queue.appendleft(item)
        else:
            queue.append(item)

    def head(self) -> T | None:
        """Return the item whose turn it is."""
        if not self._queues:
            return None
        return self._queues[min(self._queues, key=self._served.__getitem__)][0]

    def leave(self, item: T) -> None:
        """Take an item out of the line, wherever it stands; one that is not there is no error."""
        queue = self._queues.get(item.owner)
        if queue is not None and item in queue:
            queue.remove(item)
            if not queue:
                del self._queues[item.owner]
                self._forget()

    def take_place(self, owner: str) -> None:
        """Count one place for an owner."""
        self._held[owner] += 1

    def give_back(self, owner: str) -> None:
        """Count one place less."""
        self._held[owner] -= 1
        if self._held[owner] == 0:
            del self._held[owner]
            self._forget()

    def charge(self, owner: str, tokens: float) -> None:
        """Count tokens that an owner was served."""
        if owner in self._served:
            self._served[owner] += tokens

    def served(self, owner: str) -> float:
        """Return what an owner was served since it came, in tokens, above where it started."""
        return self._served.get(owner, 0.0)

    def held(self, owner: str) -> int:
        """Return how many places an owner has."""
        return self._held.get(owner, 0)

    @property
    def greediest(self) -> str:
        """The owner with most places."""
        return max(self._held, key=lambda owner: self._held[owner])

    def __iter__(self) -> Iterator[T]:
        """Iterate over all who wait."""
        for queue in self._queues.values():
            yield from queue

    def _forget(self) -> None:
        """Start all counters afresh once nobody is left; until then one who comes back finds its own."""
        if not self._queues and not self._held:
            self._served.clear()
