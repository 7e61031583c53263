"""The LoRA products of a stream's segments in bfloat16 on a CPU that has instructions for them.

Two calls per group of linears and direction: one goes through pieces of rows, the other, for the gradients of A and
B, through blocks of columns; threads share either. A segment's bits follow from its own rows and adapter
(`half_kernels.py`). Knows segments and tensors, no linears.
"""

# Shape suffix legend
#   M = rows of the stream, N = rows of one segment, P = pairs of rows, I = in features, O = out features
#   R = rank, S = R times the sites of a group

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from treadle_engine import half_kernels, tiles
from treadle_engine.grouped_gemm import Addresses
from treadle_engine.grouped_segments import GroupedLows, GroupedSegments
from treadle_engine.half_kernels import MOST_ROWS
from treadle_engine.kernel_threads import share, share_rows
from treadle_engine.lora_products import Block
from treadle_engine.tiles import WIDTH

if TYPE_CHECKING:
    from treadle_engine.lora import LoraSite, Segment

_HALF_BYTES, _BYTES = 2, 4
# Pairs from one cache line to the next.
_LINE: Final = 16
# Address, bytes from row to row, and width.
_Matrix = tuple[int, int, int]
# Columns of scratch behind the last one that counts.
_SPARE: Final = 4


def serves(dtype: torch.dtype, device: torch.device) -> bool:
    """Tell whether kernels compute the products over a base in `dtype`; then they read copies of adapters in it."""
    return dtype == torch.bfloat16 and device.type == "cpu" and tiles.multiplies_halves()


def prepare_products(dtype: torch.dtype, device: torch.device, sites: Sequence[LoraSite]) -> bool:
    """Have the kernels compiled where they compute the products over a base in `dtype`; tell whether all of them."""
    if not serves(dtype, device):
        return False
    half_kernels.compile_kernels()
    return len(whole_sites(sites)) == len(sites)


def whole_sites(sites: Sequence[LoraSite]) -> frozenset[int]:
    """Return the indices of sites in whose group all widths are whole vectors, so that they fit the kernels."""
    ragged = {site.group for site in sites if site.in_features % WIDTH or site.out_features % WIDTH}
    return frozenset(site.index for site in sites if site.group not in ragged)


def half_segments(segments: Sequence[Segment]) -> HalfSegments | None:
    """Return the segments with weights, None if there are none or the machine has no instructions for them."""
    own = [index for index, one in enumerate(segments) if one.weights is not None and one.start < one.stop]
    return HalfSegments(own, [segments[index] for index in own]) if own and tiles.multiplies_halves() else None


class HalfLows(GroupedLows):
    """A x^T of segments in bfloat16, each as pairs of rows [P, S, 2]; the last row may be zeros."""

    owner: HalfSegments

    def __init__(self, owner: HalfSegments, count: int, flat: Tensor | None = None) -> None:
        """Make room at `count` sites for the segments of `owner`, in what another one has used."""
        super().__init__(owner, count)
        self._offsets, size = owner.low_places(count)
        self.flat = torch.empty(size, dtype=torch.int32) if flat is None else flat
        self.addresses: Addresses = self.flat.data_ptr() + _BYTES * self._offsets

    def _copy_rows(self, place: int, rows_N: Tensor, chosen: HalfLows, to: int) -> None:
        rows = self._of(place).transpose(1, 2).flatten(0, 1).index_select(0, rows_N)
        paired = F.pad(rows, (0, 0, 0, rows.shape[0] % 2)).view(-1, 2, rows.shape[1]).transpose(1, 2)
        chosen._of(to).copy_(paired)

    def _of(self, place: int) -> Tensor:
        """Return one segment's low_PS2."""
        pairs, width = (int(self.owner.rows[place]) + 1) // 2, int(self.owner.ranks[place]) * self.count
        offset = int(self._offsets[place])
        return self.flat[offset : offset + pairs * width].view(torch.int16).view(pairs, width, 2)


class HalfSegments(GroupedSegments):
    """Some segments of a stream, each of which has rows and weights."""

    dtype = torch.bfloat16

    def __init__(self, indices: Sequence[int], own: Sequence[Segment]) -> None:
        """Take segments and their places in the stream."""
        super().__init__(indices, own)
        self._begins = np.array([segment.start for segment in own], np.int64)
        self._ends = np.array([segment.stop for segment in own], np.int64)
        pieces = [
            (owner, start, min(start + MOST_ROWS, segment.stop))
            for owner, segment in enumerate(own)
            for start in range(segment.start, segment.stop, MOST_ROWS)
        ]
        self._pieces = np.array(pieces, np.int64).T.copy()
        owners, starts, stops = self._pieces
        self._work = np.cumsum((stops - starts) * self.ranks[owners])
        self._wide_ranks = self.ranks.astype(np.int64)
        self._most_ranks = int(self.ranks.max())
        self._g_lows: dict[int, Tensor] = {}
        self._nowhere = np.zeros(len(self._own), np.int64)
        # By site and segment, once for all: what a pass asks for at a site is a row, or some neighbouring ones.
        self._a, self._b = (_table(self._flats, offsets, _HALF_BYTES) for offsets in (self._at_a, self._at_b))
        self._low_places: dict[int, tuple[NDArray[np.int64], int]] = {}

    def at(self, site: int) -> Self | None:
        """Return those that have weights at a site; None if there are none, or its widths do not fit the kernels."""
        there = super().at(site)
        return there if there is not None and site in there._adapters[0].layout.whole else None

    def low_places(self, count: int) -> tuple[NDArray[np.int64], int]:
        """Return where each segment's low_PS2 begins at `count` sites, in pairs, and how many there are in all."""
        if count not in self._low_places:
            sizes = -(-((self._ends - self._begins + 1) // 2 * self._wide_ranks * count) // _LINE) * _LINE
            ends = np.cumsum(sizes)
            self._low_places[count] = ends - sizes, int(ends[-1])
        return self._low_places[count]

    def forward(self, first: int, x_MI: Tensor, ys: Sequence[Tensor]) -> HalfLows:
        """Add scale * B A x to each y_MO, at neighbouring sites from `first` on; all segments have weights there."""
        lows = HalfLows(self, len(ys))
        self._forward(first, x_MI, ys, lows.addresses)
        return lows

    def add_to(self, first: int, x_MI: Tensor, ys: Sequence[Tensor]) -> None:
        """Do what `forward` does where there will be no `backward`."""
        self._forward(first, x_MI, ys, self._nowhere)

    def _forward(self, first: int, x_MI: Tensor, ys: Sequence[Tensor], lows: Addresses) -> None:
        outputs = _Matrices(ys)
        self._run_rows(half_kernels.forward, first, _Matrices((x_MI,)).only, outputs, lows)
        outputs.write_back()

    def backward(
        self, first: int, gradients: Sequence[Tensor], x_MI: Tensor, lows: GroupedLows, g_MI: Tensor | None
    ) -> Sequence[Block | None]:
        """Add scale * g A to `g_MI` unless it is None, and the gradients of A and B to the segments' `grads`.

        Nothing is left to be added: a sum is complete before it goes there, in the order of the stream.
        """
        assert isinstance(lows, HalfLows)  # what `forward` returned
        count, outputs, x = len(gradients), _Matrices(gradients), _Matrices((x_MI,)).only
        # One buffer for all sites: nobody needs it after this call.
        g_lows = HalfLows(self, count, self._g_lows.get(count))
        self._g_lows[count] = g_lows.flat
        total = None if g_MI is None else _Matrices((g_MI,))
        inner = (0, 0, x[2]) if total is None else total.only
        self._run_rows(half_kernels.backward, first, inner, outputs, g_lows.addresses)
        if total is not None:
            total.write_back()
        to = self._totals(first, count)
        if to.any():
            arguments = (
                self._begins, self._ends, self._wide_ranks, self._scales, lows.addresses, g_lows.addresses,
                *x, *outputs.tables, to,
            )  # fmt: skip
            blocks = (x[2] + sum(outputs.widths)) // WIDTH

            def run(start: int, count: int) -> None:
                half_kernels.add_gradients(start, count, *arguments)

            share_rows(blocks, WIDTH * int(self._work[-1]), run)
        return [None] * len(self.indices)

    def _run_rows(self, kernel: Any, first: int, inner: _Matrix, outer: _Matrices, lows: Addresses) -> None:
        """Run a kernel that goes through rows: those of the input, or its gradient, and of the outputs."""
        count = len(outer.widths)
        a, bs = self._a[first], self._b[first : first + count]
        scratch_columns = count * self._most_ranks + _SPARE
        own, streams = (self._begins, self._wide_ranks, self._scales), (*inner, *outer.tables)

        def run(_thread: int, cut: slice) -> None:
            scratch = np.empty((MOST_ROWS, scratch_columns), np.uint16)
            kernel(*self._pieces[:, cut], *own, scratch, a, bs, *streams, lows)

        share(self._work * (inner[2] + sum(outer.widths)), run)

    def _totals(self, first: int, count: int) -> NDArray[np.int64]:
        """Return where each segment's gradients of A, and of the B of each site, are summed; 0 where not wanted."""
        to_a, to_b = self._gradients
        to = np.concatenate((to_a[first : first + 1], to_b[first : first + count]))
        for place, segment in enumerate(self._own):
            if segment.grads is None:
                to[:, place] = 0
            elif segment.share is not None:
                to[:, place] = [segment.share.a_SI.data_ptr(), *(bt_RO.data_ptr() for bt_RO in segment.share.bt_ROs)]
        return to

    @cached_property
    def _gradients(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where the gradients of A and of B are, [sites, segments]."""
        flats = np.array([0 if one.grads is None else one.grads.data_ptr() for one in self._own], np.int64)
        return _table(flats, self._at_a, _BYTES), _table(flats, self._at_b, _BYTES)


class _Matrices:
    """Streams as kernels see them: rows may be any distance apart, columns may not."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._given = tensors
        self._own = [tensor if tensor.stride(1) == 1 else tensor.contiguous() for tensor in tensors]
        self.widths = [tensor.shape[1] for tensor in self._own]
        rows = [_HALF_BYTES * tensor.stride(0) for tensor in self._own]
        self.tables = np.array(([tensor.data_ptr() for tensor in self._own], rows, self.widths), np.int64)

    @property
    def only(self) -> _Matrix:
        """The only one."""
        address, row, width = self.tables[:, 0].tolist()
        return address, row, width

    def write_back(self) -> None:
        """Put what was written into copies where it belongs."""
        for given, own in zip(self._given, self._own, strict=True):
            if given is not own:
                given.copy_(own)


def _table(flats: Addresses, offsets: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Return addresses [sites, segments] of what lies at `offsets` [segments, sites] in flat buffers."""
    return np.ascontiguousarray((flats[:, None] + size * offsets).T)
