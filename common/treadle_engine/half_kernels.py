"""LoRA's products in bfloat16 on a CPU that multiplies pairs of them.

A library packs a product's operands anew in every call, which for a thin one takes longer than to multiply; here they
are read where they lie (`tiles.py`). A row's bits do not depend on its company. Knows addresses and sizes alone;
widths are multiples of `WIDTH`.
"""

# Shape suffix legend
#   N = rows of one segment, P = pairs of rows, I = in features, O = out features, R = rank
#   S = R times the sites of a group, T = rows of a scratch

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numba
import numpy as np

from treadle_engine.cpu_kernels import compiled, pointer
from treadle_engine.tiles import WIDTH, combiner, dotter

MOST_ROWS: Final = 64
"""Rows of a piece of work: even, and a multiple of a tile's."""

_ONE_WORD = np.zeros(1, np.uint32)

Array = Any  # numpy arrays; Numba types them by what they are called with

_dots = dotter(half=True, rounded=True)
_half8, _half4, _half1 = (combiner(rows, half=True) for rows in (8, 4, 1))
_float8, _float4, _float1 = (combiner(rows, half=False) for rows in (8, 4, 1))


@compiled()
def _down(x: int, x_row: int, rows: int, width: int, w: int, count: int, to: int, to_row: int) -> None:
    """Write x w^T of `count` rows of w; up to three rows and columns behind them are overwritten too."""
    w_row = 2 * width
    for n in range(0, rows, 4):
        x0, x1 = x + n * x_row, x + min(n + 1, rows - 1) * x_row
        x2, x3 = x + min(n + 2, rows - 1) * x_row, x + min(n + 3, rows - 1) * x_row
        for s in range(0, count, 4):
            w0, w1 = w + s * w_row, w + min(s + 1, count - 1) * w_row
            w2, w3 = w + min(s + 2, count - 1) * w_row, w + min(s + 3, count - 1) * w_row
            _dots(x0, x1, x2, x3, w0, w1, w2, w3, width // WIDTH, to + n * to_row + 2 * s, to_row)


@compiled()
def _up(low: int, low_row: int, rows: int, w: int, depth: int, width: int, to: int, to_row: int, scale: float) -> None:
    """Add scale * low w, low [rows, depth], w [depth, width]."""
    n = 0
    while n < rows:
        left = rows - n
        at, into = low + n * low_row, to + n * to_row
        for o in range(0, 2 * width, 2 * WIDTH):
            if left >= 8:
                _half8(at, low_row, 4, w + o, 2 * width, depth, into + o, to_row, scale)
            elif left >= 4:
                _half4(at, low_row, 4, w + o, 2 * width, depth, into + o, to_row, scale)
            else:
                _half1(at, low_row, 4, w + o, 2 * width, depth, into + o, to_row, scale)
        n += 8 if left >= 8 else 4 if left >= 4 else 1


@compiled()
def _sum_rows(
    pairs: int, pairs_row: int, count: int, x: int, x_row: int, rows: int, to: int, to_row: int, scale: float
) -> None:
    """Add scale * low^T x to `count` rows of `WIDTH` columns, low in pairs of rows."""
    s = 0
    while s < count:
        left = count - s
        at, into = pairs + 4 * s, to + s * to_row
        if left >= 8:
            _float8(at, 4, pairs_row, x, x_row, rows, into, to_row, scale)
        elif left >= 4:
            _float4(at, 4, pairs_row, x, x_row, rows, into, to_row, scale)
        else:
            _float1(at, 4, pairs_row, x, x_row, rows, into, to_row, scale)
        s += 8 if left >= 8 else 4 if left >= 4 else 1


@compiled()
def _pair_rows(low_TS: Array, rows: int, count: int, to: int) -> None:
    """Write neighbouring rows of bfloat16 numbers as one row of pairs; the last of an odd number is paired with 0."""
    pairs_PS = numba.carray(pointer(to, _ONE_WORD), ((rows + 1) // 2, count))
    for pair in range(rows // 2):
        a, b, both = low_TS[2 * pair], low_TS[2 * pair + 1], pairs_PS[pair]
        for s in range(count):
            both[s] = np.uint32(a[s]) | np.uint32(np.uint32(b[s]) << np.uint32(16))
    if rows % 2:
        for s in range(count):
            pairs_PS[rows // 2, s] = np.uint32(low_TS[rows - 1, s])


@compiled()
def forward(
    owners: Array, starts: Array, stops: Array, begins: Array, ranks: Array, scales: Array, low_TS: Array,
    a: Array, bs: Array, x: int, x_row: int, width: int, ys: Array, y_rows: Array, outs: Array, pairs: Array,
) -> None:  # fmt: skip
    """Add scale * B A x to the rows [start, stop) of each y, and keep A x^T as pairs of rows where `pairs` is not 0.

    Segment `owner` begins at row `begin` of the stream; low_TS is scratch, [MOST_ROWS, S + 4 or more].
    """
    low, low_row = low_TS.ctypes.data, 2 * low_TS.shape[1]
    for i in range(len(owners)):
        owner, start, rows = owners[i], starts[i], stops[i] - starts[i]
        rank, scale = ranks[owner], scales[owner]
        stacked = rank * len(ys)
        _down(x + start * x_row, x_row, rows, width, a[owner], stacked, low, low_row)
        low_TS[:, stacked] = 0
        for site in range(len(ys)):
            _up(
                low + 2 * site * rank, low_row, rows, bs[site, owner], rank, outs[site],
                ys[site] + start * y_rows[site], y_rows[site], scale,
            )  # fmt: skip
        if pairs[owner]:
            _pair_rows(low_TS, rows, stacked, pairs[owner] + (start - begins[owner]) // 2 * 4 * stacked)


@compiled()
def backward(
    owners: Array, starts: Array, stops: Array, begins: Array, ranks: Array, scales: Array, low_TS: Array,
    a: Array, bs: Array, g: int, g_row: int, width: int, gs: Array, g_rows: Array, outs: Array, pairs: Array,
) -> None:  # fmt: skip
    """Keep B^T g^T of the outputs' gradients `gs` as pairs of rows, and add scale * g A to that of the input, if any.

    What is not said is as in `forward`; `g` is 0 where the input needs no gradient.
    """
    low, low_row = low_TS.ctypes.data, 2 * low_TS.shape[1]
    for i in range(len(owners)):
        owner, start, rows = owners[i], starts[i], stops[i] - starts[i]
        rank = ranks[owner]
        stacked = rank * len(gs)
        for site in range(len(gs)):
            # By rising columns: what one writes behind its own, the next overwrites.
            _down(
                gs[site] + start * g_rows[site], g_rows[site], rows, outs[site], bs[site, owner], rank,
                low + 2 * site * rank, low_row,
            )  # fmt: skip
        low_TS[:, stacked] = 0
        if g:
            _up(low, low_row, rows, a[owner], stacked, width, g + start * g_row, g_row, scales[owner])
        _pair_rows(low_TS, rows, stacked, pairs[owner] + (start - begins[owner]) // 2 * 4 * stacked)


@compiled()
def add_gradients(
    first: int, count: int, begins: Array, ends: Array, ranks: Array, scales: Array, lows: Array, g_lows: Array,
    x: int, x_row: int, width: int, gs: Array, g_rows: Array, outs: Array, to: Array,
) -> None:  # fmt: skip
    """Add dA and dB of all segments, in order, in some blocks of `WIDTH` columns: A's, then those of each site's B.

    `to` [1 + sites, segments] are addresses of float32 numbers, 0 where no gradient is wanted.
    """
    sites = len(gs)
    for block in range(first, first + count):
        which, column, columns = 0, block * WIDTH, width
        while column >= columns:
            column -= columns
            columns = outs[which]
            which += 1
        for owner in range(len(begins)):
            into, begin, rank = to[which, owner], begins[owner], ranks[owner]
            if not into:
                continue
            rows, row, width_bytes = ends[owner] - begin, 4 * rank * sites, 4 * columns
            if which == 0:
                at = x + begin * x_row + 2 * column
                _sum_rows(
                    g_lows[owner], row, rank * sites, at, x_row, rows, into + 4 * column, width_bytes, scales[owner]
                )
            else:
                at = gs[which - 1] + begin * g_rows[which - 1] + 2 * column
                low = lows[owner] + 4 * rank * (which - 1)
                _sum_rows(low, row, rank, at, g_rows[which - 1], rows, into + 4 * column, width_bytes, scales[owner])


def compile_kernels() -> None:
    """Compile the kernels, or load them from disk."""
    none, no_scales, scratch = np.empty(0, np.int64), np.empty(0, np.float32), np.empty((MOST_ROWS, 8), np.uint16)
    table = none.reshape(0, 0)
    kernel: Callable[..., None]
    for kernel in (forward, backward):
        kernel(none, none, none, none, none, no_scales, scratch, none, table, 0, 0, 0, none, none, none, none)
    add_gradients(0, 0, none, none, none, no_scales, none, none, 0, 0, 0, none, none, none, table)
