"""Attention of a decoding step on a CPU that has the instructions for it: what the kernels are told.

Rows of texts that are read and of sequences that add one token go the same way. Knows caches and tensors, no tokens.
"""

# Shape suffix legend
#   T = rows of the step, H = query heads, G = key/value heads, d = head dimension

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from treadle_engine import attention_kernels, tiles
from treadle_engine.attention_kernels import TILE
from treadle_engine.cpu_kernels import LIKE
from treadle_engine.kernel_threads import share
from treadle_engine.kv_cache import Slot, TextCache
from treadle_engine.tiles import WIDTH

# Rows of a text that one task reads, so that threads can share it.
_MOST_ROWS: Final = 16
# Scores behind the last that counts.
_SPARE: Final = 8


def prepare_attention(dtype: torch.dtype, device: torch.device) -> None:
    """Have the kernels compiled, where a base in `dtype` attends by them."""
    if _has_kernels(dtype, device):
        attention_kernels.compile_kernels(dtype)


def serves(kv: Tensor) -> bool:
    """Tell whether the kernels can attend to a cache [..., d]."""
    return _has_kernels(kv.dtype, kv.device) and kv.shape[-1] % WIDTH == 0


def _has_kernels(dtype: torch.dtype, device: torch.device) -> bool:
    multiplies = tiles.multiplies_halves if dtype == torch.bfloat16 else tiles.multiplies_floats
    return device.type == "cpu" and dtype in LIKE and multiplies()


class KernelAttention:
    """Some rows of one step: parts of texts, then sequences that add a token."""

    def __init__(self, parts: Sequence[tuple[TextCache, int, int]], slots: Sequence[Slot], first: int) -> None:
        """Take (cache, first row, rows) of each part, and slots, whose rows follow each other from `first` on."""
        tasks: list[tuple[int, int, int]] = []
        caches: list[tuple[int, int, int, int]] = []
        for cache, start, count in parts:
            place = _cache(cache.kv_Y2GCd)
            for done in range(0, count, _MOST_ROWS):
                tasks.append((start + done, min(_MOST_ROWS, count - done), cache.length + done))
                caches.append(place)
        for row, slot in enumerate(slots, start=first):
            tasks.append((row, 1, slot.length))
            caches.append(_cache(slot.slab.kv_Y2SGCd[:, :, slot.index]))
        self._tasks, self._caches = np.array(tasks, np.int64), np.array(caches, np.int64)
        ends = self._tasks[:, 1] + self._tasks[:, 2]
        self._work = np.cumsum(self._tasks[:, 1] * ends)
        self._columns = int(ends.max()) + _SPARE
        self._scratch: list[tuple[NDArray[Any], NDArray[Any]]] = []

    def attend(
        self, layer: int, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, o_THd: Tensor, scale: float, window: int | None
    ) -> None:
        """Append the rows' keys and values, and fill their rows of o_THd."""
        heads, groups, width = q_THd.shape[1], k_TGd.shape[1], q_THd.shape[2]
        streams = [stream if stream[0].is_contiguous() else stream.contiguous() for stream in (q_THd, k_TGd, v_TGd)]
        rows = [(one.data_ptr(), one.itemsize * one.stride(0)) for one in (*streams, o_THd)]
        table, like = np.array(rows, np.int64), LIKE[q_THd.dtype]
        attention_kernels.append(like, self._tasks, self._caches, layer, groups, width, table)

        def run(thread: int, cut: slice) -> None:
            attention_kernels.attend(
                like, self._tasks[cut], self._caches[cut], layer, heads, groups, width, window or 0, np.float32(scale),
                table, *self._scratch_of(thread, like), np.empty((TILE, width), like.dtype),
            )  # fmt: skip

        share(self._work * (2 * heads * width), run)

    def _scratch_of(self, thread: int, like: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return room for a thread's scores and probabilities, [TILE, C] each."""
        while len(self._scratch) <= thread:
            shape = (TILE, self._columns)
            self._scratch.append((np.empty(shape, np.float32), np.empty(shape, like.dtype)))
        return self._scratch[thread]


def _cache(kv_Y2GCd: Tensor) -> tuple[int, int, int, int]:
    """Return address, and bytes from layer to layer, from keys to values and from head to head."""
    layers, both, heads, _, _ = kv_Y2GCd.stride()
    size = kv_Y2GCd.itemsize
    return kv_Y2GCd.data_ptr(), size * layers, size * both, size * heads
