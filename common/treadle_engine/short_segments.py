"""The LoRA products of all short segments of a stream, a few grouped calls per group of linears.

What `lora_products` does for one segment: forward, input gradient and the gradients of A and B, in float32 on a CPU.
A segment's bits follow from its own rows and adapter: each of its products is one of a grouped call, whose operands
begin at multiples of 16 bytes wherever the segment lies in the stream. Knows segments and tensors, no linears.
"""

# Shape suffix legend
#   M = rows of the stream, P = rows of all short segments, one after the other, N = rows of one segment
#   I = in features, O = out features, R = rank, S = R times the sites of a group

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from treadle_engine.grouped_gemm import ALIGNED_VALUES, Addresses, Products, TimesTransposed, available
from treadle_engine.grouped_segments import GroupedLows, GroupedSegments
from treadle_engine.lora_products import MANY_ROWS, Block

if TYPE_CHECKING:
    from treadle_engine.lora import Segment

_BYTES: Final = 4
# Values from one cache line to the next.
_LINE: Final = 16


def short_segments(segments: Sequence[Segment]) -> ShortSegments | None:
    """Return those of a stream's segments whose products are grouped, None if there are none; for a CPU."""
    short = [
        index
        for index, segment in enumerate(segments)
        if segment.weights is not None and 0 < segment.stop - segment.start < MANY_ROWS
    ]
    return ShortSegments(short, [segments[index] for index in short]) if short and available() else None


class ShortLows(GroupedLows):
    """A x^T of short segments at one group of linears: [N, S] each, every one on a cache line of its own."""

    owner: ShortSegments

    def __init__(self, owner: ShortSegments, count: int) -> None:
        """Make room at `count` sites for the segments of `owner`."""
        super().__init__(owner, count)
        self._offsets, size = owner.low_places(count)
        self._flat = torch.empty(size)
        self.addresses: Addresses = self._flat.data_ptr() + _BYTES * self._offsets

    def site(self, number: int) -> Addresses:
        """Return where the columns [N, R] of one site begin; rows are S apart."""
        addresses: Addresses = self.addresses + _BYTES * number * self.owner.ranks
        return addresses

    def _copy_rows(self, place: int, rows_N: Tensor, chosen: ShortLows, to: int) -> None:
        torch.index_select(self._of(place), 0, rows_N, out=chosen._of(to))

    def _of(self, place: int) -> Tensor:
        """Return one segment's low_NS."""
        rows, width = int(self.owner.rows[place]), int(self.owner.ranks[place]) * self.count
        offset = int(self._offsets[place])
        return self._flat[offset : offset + rows * width].view(rows, width)


class ShortSegments(GroupedSegments):
    """Some segments of a stream, each of which has rows and weights."""

    dtype = torch.float32

    def __init__(self, indices: Sequence[int], own: Sequence[Segment]) -> None:
        """Take segments and their places in the stream."""
        super().__init__(indices, own)
        self.num_rows = int(self.rows.sum())
        self.runs = _runs(self._own)
        self._starts = np.cumsum(self.rows, dtype=np.int64) - self.rows
        self._low_places: dict[int, tuple[NDArray[np.int64], int]] = {}
        self._row_places: dict[int, Addresses] = {}
        self._downs: dict[tuple[int, int, int, bool], TimesTransposed] = {}
        self._products: dict[tuple[str | int, ...], Products] = {}

    def low_places(self, count: int) -> tuple[NDArray[np.int64], int]:
        """Return where each segment's low_NS begins at `count` sites, in values, and how many there are in all."""
        if count not in self._low_places:
            sizes = -(-self.rows * self.ranks * count // _LINE) * _LINE
            ends = np.cumsum(sizes, dtype=np.int64)
            self._low_places[count] = ends - sizes, int(ends[-1])
        return self._low_places[count]

    def row_places(self, stride: int) -> Addresses:
        """Return where each segment's first row begins, in bytes, where rows are `stride` values apart."""
        if stride not in self._row_places:
            self._row_places[stride] = self._starts * (_BYTES * stride)
        return self._row_places[stride]

    def forward(self, first: int, x_MI: Tensor, ys: Sequence[Tensor]) -> ShortLows:
        """Add scale * B A x to each y_MO, at neighbouring sites from `first` on; all segments have weights there."""
        lows = ShortLows(self, len(ys))
        a = self._flats + _BYTES * self._at_a[:, first]
        self._down(_Rows(self, x_MI), a, lows.addresses, lows.count, stacked=True)
        for number, y_MO in enumerate(ys):
            y = _Rows(self, y_MO)
            bt = self._flats + _BYTES * self._at_b[:, first + number]
            self._up(y, lows.site(number), bt, lows.count, stacked=False)
            y.write_back()
        return lows

    def backward(
        self, first: int, gradients: Sequence[Tensor], x_MI: Tensor, lows: GroupedLows, g_MI: Tensor | None
    ) -> Sequence[Block | None]:
        """Add scale * g A to `g_MI` unless it is None, and the gradients of A and B to the segments' `grads`.

        Returns for each segment what is still to be added there, in the order of the stream.
        """
        assert isinstance(lows, ShortLows)  # what `forward` returned
        count = len(gradients)
        g_lows = ShortLows(self, count)
        gs = [_Rows(self, g_MO) for g_MO in gradients]
        for number, g in enumerate(gs):
            bt = self._flats + _BYTES * self._at_b[:, first + number]
            self._down(g, bt, g_lows.site(number), count, stacked=False)
        if g_MI is not None:
            total = _Rows(self, g_MI)
            self._up(total, g_lows.addresses, self._flats + _BYTES * self._at_a[:, first], count, stacked=True)
            total.write_back()
        totals = _Totals(self._own, first, count)
        if totals.wanted:
            into = [totals.addresses(self._at_a[:, first], 0)]
            into += [totals.addresses(self._at_b[:, first + number], number + 1) for number in range(count)]
            self._gradient(into[0], g_lows.addresses, _Rows(self, x_MI), count, stacked=True)
            for number, g in enumerate(gs):
                self._gradient(into[number + 1], lows.site(number), g, count, stacked=False)
        return totals.shares

    def _down(self, x: _Rows, weights: Addresses, lows: Addresses, count: int, *, stacked: bool) -> None:
        """Write x_NI W^T, with W [R, I] or [S, I] if `stacked`."""
        key = (x.width, x.stride, count, stacked)
        if key not in self._downs:
            self._downs[key] = TimesTransposed(
                len(self.indices),
                m=self.rows, n=self.ranks * np.int32(count) if stacked else self.ranks, k=x.width,
                lda=x.stride, ldb=x.width, ldc=self.ranks * np.int32(count),
            )  # fmt: skip
        self._downs[key].multiply(x.addresses, weights, lows)

    def _up(self, total: _Rows, lows: Addresses, weights: Addresses, count: int, *, stacked: bool) -> None:
        """Add scale * low_NR W, with W [R, O], or [S, O] if `stacked`."""
        key = ("up", total.width, total.stride, count, stacked)
        if key not in self._products:
            self._products[key] = Products(
                len(self.indices),
                m=self.rows, n=total.width, k=self.ranks * np.int32(count) if stacked else self.ranks,
                lda=self.ranks * np.int32(count), ldb=total.width, ldc=total.stride,
                alpha=self._scales, beta=1.0,
            )  # fmt: skip
        self._products[key].multiply(lows, weights, total.addresses)

    def _gradient(self, into: Addresses, lows: Addresses, x: _Rows, count: int, *, stacked: bool) -> None:
        """Add scale * low_NR^T x_NI, of all sites at once if `stacked`."""
        key = ("gradient", x.width, x.stride, count, stacked)
        if key not in self._products:
            self._products[key] = Products(
                len(self.indices),
                m=self.ranks * np.int32(count) if stacked else self.ranks, n=x.width, k=self.rows,
                lda=self.ranks * np.int32(count), ldb=x.stride, ldc=x.width,
                transpose_a=True, alpha=self._scales, beta=1.0,
            )  # fmt: skip
        self._products[key].multiply(lows, x.addresses, into)


class _Rows:
    """The short segments' rows of a stream in float32, so that each segment begins at a multiple of 16 bytes.

    Rows that lie that way already are not copied: what is written into them is written into the stream.
    """

    def __init__(self, owner: ShortSegments, stream: Tensor) -> None:
        self.width = stream.shape[1]
        self.stride = -(-self.width // ALIGNED_VALUES) * ALIGNED_VALUES
        self._runs, self._stream = owner.runs, stream
        # All rows of a stream that need no room between them, as they mostly are.
        self._whole: Tensor | None = None
        if len(self._runs) == 1 and self.stride == self.width:
            self._whole = stream[self._runs[0]]
            self._values = self._whole.float().contiguous()
        if self._whole is None or self._values.data_ptr() % (_BYTES * ALIGNED_VALUES):
            self._whole = None
            self._values = torch.empty(owner.num_rows, self.stride)
            for run, own in self._pieces():
                own.copy_(run)
        self.addresses: Addresses = owner.row_places(self.stride) + self._values.data_ptr()

    def write_back(self) -> None:
        """Put the values into the stream, rounding to its dtype, unless they are the stream's own."""
        if self._whole is None:
            for run, own in self._pieces():
                run.copy_(own)
        elif self._whole.data_ptr() != self._values.data_ptr():
            self._whole.copy_(self._values)

    def _pieces(self) -> list[tuple[Tensor, Tensor]]:
        """Return the runs of the stream and the same rows of the values."""
        parts = torch.split(self._values, [run.stop - run.start for run in self._runs])
        return [(self._stream[run], part[:, : self.width]) for run, part in zip(self._runs, parts, strict=True)]


class _Totals:
    """Where each segment's gradients of A and B at some sites are summed: in its `grads`, or apart from them."""

    def __init__(self, segments: Sequence[Segment], first: int, count: int) -> None:
        self.wanted = any(segment.grads is not None for segment in segments)
        self.shares: list[Block | None] = [None] * len(segments)
        self._flats = np.zeros(len(segments), np.int64)
        self._apart: list[tuple[int, Block]] = []
        if not self.wanted:
            return
        for place, segment in enumerate(segments):
            if segment.grads is not None and segment.fresh:
                self._flats[place] = segment.grads.data_ptr()
                continue
            block = segment.share
            if block is None:
                like = segment.gradient_block(first, count) or segment.block(first, count, torch.float32)
                assert like is not None  # all segments have weights here
                block = like.zeros()
                # Of a segment that wants no gradient it is thrown away.
                self.shares[place] = None if segment.grads is None else block
            self._apart.append((place, block))

    def addresses(self, offsets: NDArray[np.int64], which: int) -> Addresses:
        """Return where each segment's A (`which` 0) or B of site `which` - 1 is summed, at `offsets` in its buffer."""
        addresses: Addresses = self._flats + _BYTES * offsets
        for place, block in self._apart:
            addresses[place] = (block.a_SI if which == 0 else block.bt_ROs[which - 1]).data_ptr()
        return addresses


def _runs(segments: Sequence[Segment]) -> list[slice]:
    """Return the rows of segments, those of neighbours in one slice."""
    runs: list[slice] = []
    for segment in segments:
        if runs and runs[-1].stop == segment.start:
            runs[-1] = slice(runs[-1].start, segment.stop)
        else:
            runs.append(slice(segment.start, segment.stop))
    return runs
