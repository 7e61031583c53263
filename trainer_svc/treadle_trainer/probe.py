"""Measures at start what a training pass costs on this machine: seconds by its lengths, bytes by its tokens.

A few short passes of an adapter of rank 8, for about half a second unless the base is large. Memory is counted
allocation by allocation, so that it is the same at each start. Knows the engine, not runs or operations.
"""

# Shape suffix legend
#   S = passes that were measured, C = coefficients; T = tokens of a pass

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from treadle_engine.base_model import BaseModel
from treadle_engine.batch import TokenBatch
from treadle_engine.lora import AdapterWeights, LoraConfig
from treadle_engine.losses import LossSpec
from treadle_engine.optim import TrainState
from treadle_engine.passes import Chunk, TrainingEngine
from treadle_trainer.budget import PassCost
from treadle_trainer.memory import host_memory

_SHAPES: Final = ((1, 16), (4, 64), (1, 256), (1, 512), (8, 16), (4, 128))
"""Passes as (sequences, tokens each); the first three tell fixed cost, cost per token and cost per square apart."""
_ENOUGH_SECONDS: Final = 0.5
"""Once the first three passes are done, no other begins after so long."""
_MOST_SECONDS: Final = 6.0
"""No pass begins that would end later, going by the one before it."""
_COUNTED: Final = ((1, 16), (1, 64))


def measure(base: BaseModel, share: Callable[[float], float] = float) -> PassCost:
    """Runs passes over made-up tokens and returns their cost; the base must have no other user meanwhile.

    Ranks of one base must run the same passes: `share` gives all of them what rank 0's clock says.
    """
    engine = TrainingEngine(base)
    state = TrainState.fresh(AdapterWeights.init(base, LoraConfig(rank=8)))

    def timed(count: int, length: int) -> float:
        began = time.perf_counter()
        engine.run_pass([_chunk(state, base, count, length)])
        if base.device.type == "cuda":
            torch.cuda.synchronize(base.device)
        return share(time.perf_counter() - began)

    began = time.perf_counter()
    small, large = _COUNTED
    # The first pass fills caches, and shows whether the base is so large that its time is all there is time for.
    first = timed(*small)
    peaks = [_peak_bytes(base, lambda: timed(*small))]
    if first / small[1] * large[1] < _MOST_SECONDS / 4:
        peaks.append(_peak_bytes(base, lambda: timed(*large)))
    rows_SC, took_S = _time_passes(timed, base.info.max_context, lambda: share(time.perf_counter() - began))
    fixed, per_token, per_square = fit_cost(np.array(rows_SC), np.array(took_S)).tolist()
    return PassCost(fixed, per_token, per_square, _bytes_per_token(peaks))


def fit_cost(rows_SC: NDArray[np.float64], took_S: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns the coefficients >= 0 that fit the times best, by relative error; those that noise made negative are 0.

    The rows are (1, T, sum of L^2). With fewer passes than coefficients the later ones are 0.
    """
    scaled_SC = rows_SC / took_S[:, None]
    chosen = [1] if len(took_S) == 1 else [1, 0] if len(took_S) == 2 else [1, 0, 2]
    while True:
        fitted = np.linalg.lstsq(scaled_SC[:, chosen], np.ones_like(took_S), rcond=None)[0]
        if (fitted >= 0.0).all() or len(chosen) == 1:
            break
        # Time per token is there for certain; of the others the worse goes.
        chosen.pop(1 + int(np.argmin(fitted[1:])))
    cost_C = np.zeros(3)
    cost_C[chosen] = np.maximum(fitted, 0.0)
    return cost_C


def device_memory(device: torch.device) -> int:
    """Returns the memory of a device in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return host_memory()


def _time_passes(
    timed: Callable[[int, int], float], max_context: int, elapsed_seconds: Callable[[], float]
) -> tuple[list[tuple[float, float, float]], list[float]]:
    """Returns (1, T, sum of L^2) and the seconds of as many passes as there is time for; of one at least."""
    rows: list[tuple[float, float, float]] = []
    took: list[float] = []
    for count, wanted in _SHAPES:
        length = min(wanted, max_context)
        elapsed = elapsed_seconds()
        if took and elapsed + took[-1] / rows[-1][1] * count * length > _MOST_SECONDS:
            break
        if len(took) >= 3 and elapsed > _ENOUGH_SECONDS:
            break
        took.append(timed(count, length))
        rows.append((1.0, float(count * length), float(count * length * length)))
    return rows, took


def _chunk(state: TrainState, base: BaseModel, count: int, length: int) -> Chunk:
    total = count * min(length, base.info.max_context)
    tokens_T = (np.arange(total) % base.info.vocab_size).astype(np.int32)
    lengths = np.full(count, total // count, dtype=np.int64)
    batch = TokenBatch(lengths, tokens_T, tokens_T, {"weights": np.ones(total, dtype=np.float32)})
    return Chunk(state, batch, LossSpec("cross_entropy"))


def _bytes_per_token(peaks: Sequence[int]) -> int:
    """Returns the slope between two peaks, or a bound on it from one: what is fixed counts in."""
    (_, small), (_, large) = _COUNTED
    if len(peaks) == 1:
        return peaks[0] // small
    return max(1, (peaks[1] - peaks[0]) // (large - small))


def _peak_bytes(base: BaseModel, run: Callable[[], object]) -> int:
    """Returns the most bytes that tensors made by `run` held at a time."""
    if base.device.type == "cuda":
        before = torch.cuda.memory_allocated(base.device)
        torch.cuda.reset_peak_memory_stats(base.device)
        run()
        return int(torch.cuda.max_memory_allocated(base.device)) - before
    counted = _CountedAllocations()
    with counted:
        run()
    return counted.peak


class _CountedAllocations(TorchDispatchMode):
    """Counts the bytes of storages that operations make, until they are freed. One thread's operations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._live = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    # Any: what torch passes to a dispatch mode, by its own protocol.
    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                # A view, or a result written in place, is no new memory.
                if id(storage) not in given and storage not in self._known:
                    self._note(storage)
        return made

    def _note(self, storage: torch.UntypedStorage) -> None:
        num_bytes = storage.nbytes()
        self._known.add(storage)
        self._live += num_bytes
        self.peak = max(self.peak, self._live)
        weakref.finalize(storage, self._release, num_bytes)

    def _release(self, num_bytes: int) -> None:
        self._live -= num_bytes
