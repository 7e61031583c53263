"""Who takes part in the next step, so that an owner who brings little is not held up by one who brings much.

Whoever takes part in a step waits for all of it. Under ideal sharing by N owners (generalized processor sharing) none
would wait longer per token than N steps of its own alone take. As long as steps of everybody's rows keep to that for
the lightest owner, all take part, and about equal ones always do. Where they do not, the excess is made up for by short
steps in between, for which those come first who had fewest rows. Lengths are in rows, by what steps hold: ranks of one
base decide alike. Knows nothing of what a row is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Final

RECENT_STEPS: Final = 64
"""How long an owner is remembered: between two requests it is away for some steps of others."""

_SHORT, _SHORT_OF_THREE = 0.5, 0.64
"""Longest short step, of what is due: the rest makes up for the excess. Half would not hold two light owners of three,
who would take turns and wait for more than half as long again as they should."""


class StepTurns:
    """What owners had lately, and how far the lightest of them is behind."""

    def __init__(self, fixed_rows: float) -> None:
        """`fixed_rows` is what a step takes whatever it holds, as so many rows."""
        self._fixed = fixed_rows
        self._due = 0.0
        self._late = 0.0
        self._steps = 0
        self._had: dict[str, float] = {}
        self._brought: dict[str, float] = {}
        self._last: dict[str, int] = {}

    def in_turn(self, owners: Iterable[str]) -> list[str]:
        """Returns the owners, those first who had fewest rows; who is new has had as many as the first of the rest."""
        there = set(owners)
        least = self._least(there)
        return sorted(there, key=lambda owner: (self._had.get(owner, least), owner))

    def fair_length(self, rows: Mapping[str, float]) -> float:
        """Returns the rows of a step, beyond its fixed ones, that holds up nobody who is there or was of late."""
        lately = {**self._brought, **rows}
        if len(lately) < 2:
            return math.inf
        return self._due_of(lately) - self._fixed

    def choose(self, rows: Mapping[str, float]) -> list[str]:
        """Returns which of the owners, with the rows that they would bring, take part in the next step, in turn.

        `charge` must follow.
        """
        self._due = self._due_of(rows)
        if len(rows) < 2:
            self._late = 0.0
        self._brought.update(rows)
        owners = self.in_turn(rows)
        if self._late <= 0.0:
            return owners
        room = self._due * (_SHORT_OF_THREE if len(rows) == 3 else _SHORT) - self._fixed
        chosen = []
        for owner in owners:
            if rows[owner] <= room:
                room -= rows[owner]
                chosen.append(owner)
        return chosen

    def charge(self, rows: Mapping[str, float]) -> None:
        """Takes a step of so many rows of each owner into account."""
        if not rows:
            return
        self._late = max(0.0, self._late + self._fixed + sum(rows.values()) - self._due)
        self._steps += 1
        least = self._least(rows)
        for owner, count in rows.items():
            self._had[owner] = self._had.get(owner, least) + count
            self._last[owner] = self._steps
        for owner in [owner for owner, step in self._last.items() if self._steps - step >= RECENT_STEPS]:
            del self._had[owner], self._last[owner]
        self._brought = {owner: count for owner, count in self._brought.items() if owner in self._last}

    def _least(self, owners: Iterable[str]) -> float:
        """Returns what the first of these owners in turn has had: where one that is new begins."""
        return min((self._had[owner] for owner in owners if owner in self._had), default=0.0)

    def _due_of(self, rows: Mapping[str, float]) -> float:
        """Returns what as many steps take as there are owners, of what the lightest brings."""
        return len(rows) * (self._fixed + min(rows.values(), default=0.0))
