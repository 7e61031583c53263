"""Zeroed buffers whose pages are in memory already, for weights and gradients that are about to come.

A fresh buffer of tens of megabytes takes longer to come by than everything else that is done with it. Knows nothing of
runs and adapters.
"""

from __future__ import annotations

import threading
from typing import Final

import torch
from torch import Tensor

MOST_BYTES: Final = 2**28


def half_length(num_elements: int) -> int:
    """Returns the length of a buffer that has room for so many elements of half the size."""
    return -(-num_elements // 2)


class SpareBuffers:
    """Float32 buffers on the CPU, the newest first; what is beyond `most_bytes` is let go. Safe from any thread."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._most_bytes = most_bytes
        self._spare: list[Tensor] = []
        self._lock = threading.Lock()

    def put(self, zeros: Tensor) -> None:
        """Keeps a buffer that holds zeros only; a device's own allocator keeps its buffers better."""
        if zeros.device.type != "cpu":
            return
        with self._lock:
            self._spare.append(zeros)
            while sum(buffer.nbytes for buffer in self._spare) > self._most_bytes:
                del self._spare[0]

    def take(self, num_elements: int) -> Tensor | None:
        """Returns a buffer of zeros of exactly this length, None if there is none."""
        with self._lock:
            for index in reversed(range(len(self._spare))):
                if self._spare[index].numel() == num_elements:
                    return self._spare.pop(index)
        return None

    def prepare(self, num_elements: int) -> None:
        """Makes a buffer of this length, unless there is one or it would be too long."""
        with self._lock:
            there = any(buffer.numel() == num_elements for buffer in self._spare)
        if not there and 4 * num_elements <= self._most_bytes:
            # Written to, not `zeros`: the kernel gives pages when they are first touched.
            self.put(torch.empty(num_elements, dtype=torch.float32).zero_())
