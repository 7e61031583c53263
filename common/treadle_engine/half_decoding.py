"""Attention of a decoding step in bfloat16 on a CPU that has instructions for it: what the kernels are told.

Rows of texts that are read and of sequences that add one token go the same way. Knows caches and tensors, no tokens.
"""

# Shape suffix legend
#   T = rows of the step, H = query heads, G = key/value heads, d = head dimension

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from treadle_engine import half_attention, half_tiles
from treadle_engine.half_attention import TILE
from treadle_engine.half_tiles import WIDTH
from treadle_engine.kernel_threads import share
from treadle_engine.kv_cache import Slot, TextCache

_HALF_BYTES: Final = 2
# Rows of a text that one task reads, so that threads can share it.
_MOST_ROWS: Final = 16
# Scores behind the last that counts.
_SPARE: Final = 8


def prepare_attention(dtype: torch.dtype, device: torch.device) -> None:
    """Have the kernels compiled, where a base in `dtype` attends by them."""
    if dtype == torch.bfloat16 and device.type == "cpu" and half_tiles.available():
        half_attention.compile_kernels()


def serves(kv: Tensor) -> bool:
    """Tell whether the kernels can attend to a cache [..., d]."""
    fits = kv.dtype == torch.bfloat16 and kv.shape[-1] % WIDTH == 0
    return fits and kv.device.type == "cpu" and half_tiles.available()


class HalfDecoding:
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
        self._scratch: list[tuple[NDArray[np.float32], NDArray[np.uint16]]] = []

    def attend(
        self, layer: int, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, o_THd: Tensor, scale: float, window: int | None
    ) -> None:
        """Append the rows' keys and values, and fill their rows of o_THd."""
        heads, groups, width = q_THd.shape[1], k_TGd.shape[1], q_THd.shape[2]
        streams = [stream if stream[0].is_contiguous() else stream.contiguous() for stream in (q_THd, k_TGd, v_TGd)]
        table = np.array([(one.data_ptr(), _HALF_BYTES * one.stride(0)) for one in (*streams, o_THd)], np.int64)
        half_attention.append(self._tasks, self._caches, layer, groups, width, table)

        def run(thread: int, cut: slice) -> None:
            half_attention.attend(
                self._tasks[cut], self._caches[cut], layer, heads, groups, width, window or 0, np.float32(scale), table,
                *self._scratch_of(thread), np.empty((TILE, width), np.uint16),
            )  # fmt: skip

        share(self._work * (2 * heads * width), run)

    def _scratch_of(self, thread: int) -> tuple[NDArray[np.float32], NDArray[np.uint16]]:
        """Return room for a thread's scores and probabilities, [TILE, C] each."""
        while len(self._scratch) <= thread:
            shape = (TILE, self._columns)
            self._scratch.append((np.empty(shape, np.float32), np.empty(shape, np.uint16)))
        return self._scratch[thread]


def _cache(kv_Y2GCd: Tensor) -> tuple[int, int, int, int]:
    """Return address, and bytes from layer to layer, from keys to values and from head to head."""
    layers, both, heads, _, _ = kv_Y2GCd.stride()
    return kv_Y2GCd.data_ptr(), _HALF_BYTES * layers, _HALF_BYTES * both, _HALF_BYTES * heads
