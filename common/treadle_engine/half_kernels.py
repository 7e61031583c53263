"""LoRA's products in bfloat16 on a CPU that multiplies pairs of them (AVX512-BF16), by tiles written as instructions.

A library packs a product's operands anew in every call, which for a thin one takes longer than to multiply; here they
are read where they lie. Sums are in float32, over pairs that a number's own row or column fixes, and rounded once: a
row's bits do not depend on its company. Knows addresses and sizes alone; widths are multiples of `WIDTH`.
"""

# Shape suffix legend
#   N = rows of one segment, P = pairs of rows, I = in features, O = out features, R = rank
#   S = R times the sites of a group, T = rows of a scratch

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Final

import llvmlite.binding
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from treadle_engine.cpu_kernels import compiled, pointer

WIDTH: Final = 32
"""Values of a vector."""

MOST_ROWS: Final = 64
"""Rows of a piece of work: even, and a multiple of a tile's."""

_HALF, _WORD, _LONG, _FLOAT = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_HALVES, _WORDS, _FLOATS = ir.VectorType(_HALF, WIDTH), ir.VectorType(_WORD, WIDTH // 2), ir.VectorType(_FLOAT, 16)
_NEEDED: Final = ("avx512bf16", "avx512bw", "avx512vl")
_ONE_WORD = np.zeros(1, np.uint32)

Array = Any  # numpy arrays; Numba types them by what they are called with


class _BFloat(ir.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite does not list."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


_BFLOATS, _FOUR_BFLOATS, _FOUR_HALVES = (
    ir.VectorType(_BFloat(), WIDTH),
    ir.VectorType(_BFloat(), 4),
    ir.VectorType(_HALF, 4),
)
# Of two rows, the pairs of one column each: within every eight columns, the first four, then the other four.
_FIRST: Final = [lane // 8 * 8 + lane % 8 // 2 + WIDTH * (lane % 2) for lane in range(WIDTH)]
_SECOND: Final = [lane + 4 for lane in _FIRST]
# Where the columns are among the sums of both.
_ORDER: Final = [column // 8 * 4 + column % 4 + column % 8 // 4 * 16 for column in range(WIDTH)]


@lru_cache(maxsize=1)
def available() -> bool:
    """Tell whether this machine has the instructions."""
    features = llvmlite.binding.get_host_cpu_features()
    return all(features.get(name, False) for name in _NEEDED)


class _Tile:
    """Instructions of one tile, as they are put together."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder

    def sums(self, count: int) -> list[Any]:
        """Return places for sums, which are zero; they end up in registers."""
        places = [cgutils.alloca_once(self.builder, _FLOATS) for _ in range(count)]
        for place in places:
            self.builder.store(ir.Constant(_FLOATS, [0.0] * 16), place)
        return places

    def load(self, address: Any, kind: Any) -> Any:
        value = self.builder.load(self.builder.inttoptr(address, kind.as_pointer()))
        value.align = 2
        return value

    def store(self, value: Any, address: Any) -> None:
        self.builder.store(value, self.builder.inttoptr(address, value.type.as_pointer()), align=2)

    def load_halves(self, address: Any) -> Any:
        return self.builder.bitcast(self.load(address, _HALVES), _BFLOATS)

    def pick(self, a: Any, b: Any, lanes: Sequence[int]) -> Any:
        return self.builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_WORD, len(lanes)), list(lanes)))

    def spread(self, value: Any, kind: Any) -> Any:
        """Return a vector of one value."""
        alone = self.builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(_WORD, 0))
        return self.pick(alone, alone, [0] * 16)

    def add_pairs(self, place: Any, a: Any, b: Any) -> None:
        """Add the products of pairs to a sum."""
        kind = ir.FunctionType(_FLOATS, [_FLOATS, _BFLOATS, _BFLOATS])
        name = "llvm.x86.avx512bf16.dpbf16ps.512"
        function = cgutils.get_or_insert_function(self.builder.module, kind, name)
        self.builder.store(self.builder.call(function, [self.builder.load(place), a, b]), place)

    def plus(self, address: Any, amount: int) -> Any:
        return self.builder.add(address, ir.Constant(_LONG, amount))


def _combiner(rows: int, *, half: bool) -> Any:
    """Return what adds scale * L W to `rows` rows and `WIDTH` columns, in bfloat16 (`half`) or float32."""

    @intrinsic  # type: ignore[untyped-decorator]
    def combine(
        _context: Any, low: Any, low_row: Any, low_pair: Any, w: Any, w_row: Any, depth: Any, to: Any, to_row: Any,
        scale: Any,
    ) -> Any:  # fmt: skip
        """L is pairs of bfloat16, `low_row` and `low_pair` bytes apart; W has `depth` rows. All are addresses."""

        def build(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            low, low_row, low_pair, w, w_row, depth, to, to_row, scale = arguments
            tile = _Tile(builder)
            sums = tile.sums(2 * rows)
            none = ir.Constant(_HALVES, [0] * WIDTH)
            last = tile.plus(depth, -1)
            with cgutils.for_range(builder, builder.lshr(tile.plus(depth, 1), ir.Constant(_LONG, 1))) as loop:
                first = builder.shl(loop.index, ir.Constant(_LONG, 1))
                above = builder.add(w, builder.mul(first, w_row))
                paired = builder.icmp_signed("<", first, last)
                # The last row of an odd number has zeros for company; what is read instead of it does not count.
                below = builder.add(above, builder.select(paired, w_row, ir.Constant(_LONG, 0)))
                a, b = tile.load(above, _HALVES), builder.select(paired, tile.load(below, _HALVES), none)
                pairs = [builder.bitcast(tile.pick(a, b, lanes), _BFLOATS) for lanes in (_FIRST, _SECOND)]
                at = builder.add(low, builder.mul(loop.index, low_pair))
                for row in range(rows):
                    factors = builder.bitcast(tile.spread(tile.load(at, _WORD), _WORDS), _BFLOATS)
                    for part in range(2):
                        tile.add_pairs(sums[2 * row + part], pairs[part], factors)
                    at = builder.add(at, low_row)
            factor = tile.spread(scale, _FLOATS)
            for row in range(rows):
                first, second = (builder.fmul(builder.load(sums[2 * row + part]), factor) for part in range(2))
                if half:
                    _add_half(tile, to, none, first, second)
                else:
                    for part in range(2):
                        at = tile.plus(to, 64 * part)
                        more = tile.pick(first, second, _ORDER[16 * part : 16 * (part + 1)])
                        tile.store(builder.fadd(tile.load(at, _FLOATS), more), at)
                to = builder.add(to, to_row)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8, types.float32), build

    return combine


def _add_half(tile: _Tile, to: Any, none: Any, first: Any, second: Any) -> None:
    """Add sums to bfloat16 numbers, rounding once."""
    builder, old = tile.builder, tile.load(to, _HALVES)
    # A bfloat16 behind 16 zero bits is the same number in float32.
    wide = [builder.bitcast(tile.pick(none, old, lanes), _FLOATS) for lanes in (_FIRST, _SECOND)]
    added = [builder.fadd(one, more) for one, more in zip(wide, (first, second), strict=True)]
    rounded = builder.fptrunc(tile.pick(added[0], added[1], _ORDER), _BFLOATS)
    tile.store(builder.bitcast(rounded, _HALVES), to)


@intrinsic  # type: ignore[untyped-decorator]
def _dots(
    _context: Any, x0: Any, x1: Any, x2: Any, x3: Any, w0: Any, w1: Any, w2: Any, w3: Any, blocks: Any, to: Any,
    to_row: Any,
) -> Any:  # fmt: skip
    """Write the products of four rows with four others, `blocks` vectors long, rounded to bfloat16."""

    def build(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        rows, others, (blocks, to, to_row) = arguments[:4], arguments[4:8], arguments[8:]
        tile = _Tile(builder)
        sums = tile.sums(16)
        with cgutils.for_range(builder, blocks) as loop:
            offset = builder.shl(loop.index, ir.Constant(_LONG, 6))
            left = [tile.load_halves(builder.add(row, offset)) for row in rows]
            for column, other in enumerate(others):
                right = tile.load_halves(builder.add(other, offset))
                for row in range(4):
                    tile.add_pairs(sums[4 * row + column], left[row], right)
        for row in range(4):
            four = _across(tile, [builder.load(place) for place in sums[4 * row : 4 * row + 4]])
            tile.store(builder.bitcast(builder.fptrunc(four, _FOUR_BFLOATS), _FOUR_HALVES), to)
            to = builder.add(to, to_row)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 11), build


def _across(tile: _Tile, vectors: Sequence[Any]) -> Any:
    """Return the sums of four vectors' lanes."""

    def halve(a: Any, b: Any, lanes: Sequence[int], step: int) -> Any:
        return tile.builder.fadd(tile.pick(a, b, lanes), tile.pick(a, b, [lane + step for lane in lanes]))

    single = [lane // 4 * 4 + lane % 4 // 2 + lane % 2 * 16 for lane in range(16)]
    double = [lane // 4 * 4 + lane % 2 + lane % 4 // 2 * 16 for lane in range(16)]
    left, right = (halve(a, b, single, 2) for a, b in (vectors[:2], vectors[2:]))
    fours = halve(left, right, double, 2)
    eight = halve(fours, fours, range(8), 8)
    return halve(eight, eight, range(4), 4)


_half8, _half4, _half1 = (_combiner(rows, half=True) for rows in (8, 4, 1))
_float8, _float4, _float1 = (_combiner(rows, half=False) for rows in (8, 4, 1))


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
    """Add scale * B A x to the rows [start, stop) of each y, and keep A x^T as pairs of rows.

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
