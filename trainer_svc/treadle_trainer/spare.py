"""Zeroed gradient buffers of runs that were parked, for runs that come back.

A fresh buffer of tens of megabytes takes longer to come by than everything else that a run's return needs. Knows
nothing of runs.
"""

from __future__ import annotations

from typing import Final

from torch import Tensor

MOST_BYTES: Final = 2**28


class SpareGradients:
    """Buffers on the CPU, the newest first; what is beyond `most_bytes` is let go."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._most_bytes = most_bytes
        self._spare: list[Tensor] = []

    def put(self, zeros: Tensor) -> None:
        """Keeps a buffer that holds zeros only; a device's own allocator keeps its buffers better."""
        if zeros.device.type != "cpu":
            return
        self._spare.append(zeros)
        while sum(buffer.nbytes for buffer in self._spare) > self._most_bytes:
            del self._spare[0]

    def take(self, num_elements: int) -> Tensor | None:
        """Returns a buffer of zeros of exactly this length, None if there is none."""
        for index in reversed(range(len(self._spare))):
            if self._spare[index].numel() == num_elements:
                return self._spare.pop(index)
        return None
