"""What to do when a stream of chunks does not fit into memory: undo it, and try its halves.

A stream that failed midway has added some of its gradient. `Gradients` remembers what was there before, so that the
chunks can run again, in the same order and to the same bits. Knows neither models nor losses.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from treadle_engine.optim import TrainState

# How the allocators of a CPU (torch, C++ libraries) and of oneDNN say it; on CUDA it is an exception of its own.
_PHRASES = ("can't allocate memory", "not enough memory", "bad_alloc", "out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an exception says that an allocation failed."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in _PHRASES)


class Gradients:
    """The gradients of some runs as they were; a run that had none yet costs no copy."""

    def __init__(self, states: Sequence[TrainState]) -> None:
        """Remember each run's gradient, and note that it is about to get more."""
        self._before: list[tuple[TrainState, Tensor | None]] = []
        self._fresh: set[int] = set()
        unique = {id(state): state for state in states}
        copies = [state.grads.clone() if state.has_gradient else None for state in unique.values()]
        for state, copy in zip(unique.values(), copies, strict=True):
            self._before.append((state, copy))
            if not state.has_gradient:
                self._fresh.add(id(state))
            state.has_gradient = True

    def begin(self, state: TrainState) -> bool:
        """Tell whether nothing has been added to a run's gradient yet; from now on something has."""
        fresh = id(state) in self._fresh
        self._fresh.discard(id(state))
        return fresh

    def undo(self) -> None:
        """Put all of them back."""
        for state, copy in self._before:
            if copy is None:
                state.clear_gradient()
            else:
                state.grads.copy_(copy)
