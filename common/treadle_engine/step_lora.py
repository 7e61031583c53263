"""LoRA of one decoding step on a CPU: one kernel call per group of linears reads every adapter where it lies.

Adapters are not copied or stacked, and a row's bits follow from its own numbers and its adapter (`cpu_kernels.py`).
Knows segments and tensors: no linears, nothing of decoding.
"""

# Shape suffix legend
#   M = rows of the step, I = in features, O = out features, R = rank, S = R times the sites of a group
#   T = 4 rows of a tile

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from treadle_engine.cpu_kernels import LIKE, TILE, add_lora
from treadle_engine.grouped_gemm import Addresses
from treadle_engine.grouped_segments import stacked_offsets
from treadle_engine.half_segments import half_segments
from treadle_engine.kernel_threads import share
from treadle_engine.lora import AdapterWeights, Segment

_BYTES: Final = 4
# Rows of a product, so that threads can share a long segment.
_MOST_ROWS: Final = 64
_FLOATS: Final = LIKE[torch.float32]


class Scratch:
    """Memory in which a kernel keeps a tile of rows, one piece per thread; used again by every step."""

    def __init__(self, widths: Sequence[tuple[int, int]]) -> None:
        """Make room for linears of (in, out) features."""
        self._inner, self._outer = (max(sides) for sides in zip(*widths, strict=True))
        self._made: list[tuple[NDArray[np.float32], ...]] = []

    def of(self, thread: int, stacked: int) -> tuple[NDArray[np.float32], ...]:
        """Return (x_TI, low_TS, sum_TO) of a thread, with room for S = `stacked`."""
        while len(self._made) <= thread:
            self._made.append(tuple(np.empty((TILE, width), np.float32) for width in (self._inner, 64, self._outer)))
        x_TI, low_TS, sum_TO = self._made[thread]
        if low_TS.shape[1] < stacked:
            self._made[thread] = x_TI, np.empty((TILE, stacked), np.float32), sum_TO
        return self._made[thread]


class StepLora(list[Segment]):
    """The segments of one step, with addresses worked out once for all layers."""

    def __init__(self, segments: Sequence[Segment], scratch: Scratch, dtype: torch.dtype = torch.float32) -> None:
        """Take the segments; the scratch is that of the base in `dtype`, whose thread runs the step."""
        super().__init__(segments)
        self._scratch = scratch
        self._half = half_segments(self) if dtype == torch.bfloat16 else None

    @cached_property
    def _all(self) -> _Products | None:
        adapted = [segment for segment in self if segment.weights is not None and segment.weights.layout.sites]
        return _Products(adapted, self._scratch) if adapted else None

    def add_to(self, sites: Sequence[int], x_MI: Tensor, ys: Sequence[Tensor]) -> None:
        """Add scale * B A x of every segment's adapter to each y_MO, at neighbouring sites that share their input.

        All are float32 or all bfloat16; sums are in float32 and rounded once. Raises ValueError unless contiguous.
        """
        half = None if self._half is None else self._half.at(sites[0])
        if half is not None:
            half.add_to(sites[0], x_MI, ys)
            return
        products = None if self._all is None else self._all.at(sites[0])
        if products is None:
            return
        if not all(tensor.is_contiguous() for tensor in (x_MI, *ys)):
            raise ValueError("inputs and outputs of linears must be contiguous")
        products.add_to(sites[0], x_MI, ys)


def compile_kernel(dtype: torch.dtype) -> None:
    """Compile the kernel for a base of float32 or bfloat16, or load it from disk."""
    none, no_scales = np.empty(0, np.int64), np.empty(0, np.float32)
    tile = np.empty((TILE, 1), np.float32)
    add_lora(
        LIKE[dtype], _FLOATS, 0, 1, none, none, none, none.reshape(0, 0), none, none, none, no_scales, tile, tile, tile
    )


class _Products:
    """Segments that have weights at the sites in question, cut into pieces that threads can share."""

    def __init__(self, segments: Sequence[Segment], scratch: Scratch) -> None:
        self._scratch = scratch
        cuts = [
            (segment, start, min(start + _MOST_ROWS, segment.stop))
            for segment in segments
            for start in range(segment.start, segment.stop, _MOST_ROWS)
        ]
        self._owners = [segment for segment, _, _ in cuts]
        adapters = [weights for segment in self._owners if (weights := segment.weights) is not None]
        self._starts = np.array([start for _, start, _ in cuts], np.int64)
        self._stops = np.array([stop for _, _, stop in cuts], np.int64)
        self._ranks = np.array([weights.config.rank for weights in adapters], np.int64)
        self._scales = np.array([weights.scale for weights in adapters], np.float32)
        self._at_a = _addresses(adapters, [weights.layout.offsets_a for weights in adapters])
        self._at_b = _addresses(adapters, [weights.layout.offsets_b for weights in adapters])
        self._work = np.cumsum((self._stops - self._starts) * self._ranks)
        self._at: dict[int, _Products | None] = {}
        self._parts: dict[bytes, _Products | None] = {}
        self._widths: dict[tuple[int, ...], NDArray[np.int64]] = {}

    def at(self, site: int) -> _Products | None:
        """Return those that have weights at a site, None if there are none."""
        if site not in self._at:
            self._at[site] = self._those_with(site)
        return self._at[site]

    def add_to(self, first: int, x_MI: Tensor, ys: Sequence[Tensor]) -> None:
        """Add scale * B A x to each y_MO, at the sites from `first` on."""
        outer = tuple(y_MO.shape[1] for y_MO in ys)
        if outer not in self._widths:
            self._widths[outer] = np.array(outer, np.int64)
        width = x_MI.shape[1]
        a, b = self._at_a[first], self._at_b[first : first + len(ys)]
        at_y = np.array([y_MO.data_ptr() for y_MO in ys], np.int64)
        arguments = LIKE[x_MI.dtype], _FLOATS, x_MI.data_ptr(), width, self._widths[outer], at_y

        def run(thread: int, cut: slice) -> None:
            scratch = self._scratch.of(thread, len(ys) * int(self._ranks.max()))
            # The kernel is compiled for tables without gaps.
            add_lora(
                *arguments, a[cut], np.ascontiguousarray(b[:, cut]), self._starts[cut], self._stops[cut],
                self._ranks[cut], self._scales[cut], *scratch,
            )  # fmt: skip

        share(self._work * (width + sum(outer)), run)

    def _those_with(self, site: int) -> _Products | None:
        if site >= len(self._at_a):
            return None
        present = self._at_a[site] >= 0
        if present.all():
            return self
        key = present.tobytes()
        if key not in self._parts:
            some = {id(owner): owner for owner, here in zip(self._owners, present, strict=True) if here}
            self._parts[key] = _Products(list(some.values()), self._scratch) if some else None
        return self._parts[key]


def _addresses(adapters: Sequence[AdapterWeights], offsets: Sequence[NDArray[np.int64]]) -> Addresses:
    """Return the addresses [sites, adapters] of what lies at `offsets` in each adapter, -1 where there is nothing."""
    flats = np.array([[weights.flat.data_ptr()] for weights in adapters], np.int64)
    stacked = stacked_offsets(offsets)
    return np.ascontiguousarray(np.where(stacked < 0, -1, flats + _BYTES * stacked).T)
