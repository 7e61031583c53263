"""The results of one run as a pure log: when each may be shown, and when it may be forgotten.

A result may be shown once its operation is durable; a failure only once it is durable itself, since computing it
again after a crash might not fail again. Results are shown in order of seq. Knows neither the store nor streams.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

MAX_UNACKED: Final = 256
"""Results kept for a client that never acknowledges any."""


@dataclass(frozen=True, slots=True)
class StoredResult:
    """A serialized OperationResult; `stored` tells that it comes from the journal."""

    data: bytes
    failed: bool
    stored: bool = False


class ResultLog:
    """The results of one run from `floor_seq` + 1 on."""

    def __init__(self, acked_seq: int = 0, shown_seq: int = 0, appended_seq: int = 0) -> None:
        """Starts with results delivered up to `acked_seq`, shown up to `shown_seq`, operations durable to the last."""
        self.acked_seq = acked_seq
        self.shown_seq = shown_seq
        """Last seq whose result may be shown, with all before it."""
        self.appended_seq = appended_seq
        self.committed_seq = shown_seq
        self._results: dict[int, StoredResult] = {}

    def put(self, seq: int, result: StoredResult) -> bool:
        """Keeps a result; returns whether more can be shown now."""
        self._results[seq] = result
        return self._advance()

    def mark_appended(self, seq: int) -> bool:
        """Notes that operations up to `seq` are durable; returns whether more can be shown now."""
        self.appended_seq = max(self.appended_seq, seq)
        return self._advance()

    def mark_committed(self, seq: int) -> bool:
        """Notes that results up to `seq` are durable; returns whether more can be shown now."""
        self.committed_seq = max(self.committed_seq, seq)
        return self._advance()

    def get(self, seq: int) -> StoredResult | None:
        """Returns a result that may be shown, None if there is none (yet, or any more)."""
        return self._results.get(seq) if seq <= self.shown_seq else None

    def ack(self, seq: int) -> None:
        """Forgets results up to `seq`, as far as they were shown."""
        self.acked_seq = max(self.acked_seq, min(seq, self.shown_seq))
        for old in [old for old in self._results if old <= self.acked_seq]:
            del self._results[old]

    def _advance(self) -> bool:
        before = self.shown_seq
        while (result := self._results.get(self.shown_seq + 1)) is not None:
            seq = self.shown_seq + 1
            if not result.stored and (seq > self.appended_seq or (result.failed and seq > self.committed_seq)):
                break
            self.shown_seq = seq
        if self.shown_seq - self.acked_seq > MAX_UNACKED:
            self.ack(self.shown_seq - MAX_UNACKED)
        return self.shown_seq != before
