"""Tiles of products for a CPU with wide vectors, written as instructions: of bfloat16 (AVX512-BF16), and of float32.

Numba, which compiles the loops around them, knows no vectors. Operands are read where they lie. Sums are in float32,
in an order that a number's own row or column fixes; of bfloat16 pairs are multiplied, and a sum is rounded once. Knows
addresses alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core import cgutils, config
from numba.extending import intrinsic

WIDTH: Final = 32
"""Columns of a tile: a vector of bfloat16, two of float32."""

_HALF, _WORD, _LONG, _FLOAT = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_HALVES, _WORDS, _FLOATS = ir.VectorType(_HALF, WIDTH), ir.VectorType(_WORD, WIDTH // 2), ir.VectorType(_FLOAT, 16)
_NEEDED: Final = {True: ("avx512bf16", "avx512bw", "avx512vl"), False: ("avx2", "fma")}


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


def multiplies_halves() -> bool:
    """Tell whether this machine has the instructions for bfloat16."""
    return _has(half=True)


def multiplies_floats() -> bool:
    """Tell whether this machine has the instructions for float32."""
    return _has(half=False)


@lru_cache(maxsize=2)
def _has(*, half: bool) -> bool:
    if config.CPU_FEATURES is not None:  # NUMBA_CPU_FEATURES: what Numba is to compile for
        return {f"+{name}" for name in _NEEDED[half]} <= set(config.CPU_FEATURES.split(","))
    features = {} if config.CPU_NAME is not None else llvmlite.binding.get_host_cpu_features()
    return all(features.get(name, False) for name in _NEEDED[half])


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

    def load_vector(self, address: Any, *, half: bool) -> Any:
        return self.builder.bitcast(self.load(address, _HALVES), _BFLOATS) if half else self.load(address, _FLOATS)

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

    def add_product(self, place: Any, a: Any, b: Any) -> None:
        """Add the products of float32 numbers to a sum."""
        kind = ir.FunctionType(_FLOATS, [_FLOATS] * 3)
        function = cgutils.get_or_insert_function(self.builder.module, kind, "llvm.fma.v16f32")
        self.builder.store(self.builder.call(function, [a, b, self.builder.load(place)]), place)

    def plus(self, address: Any, amount: int) -> Any:
        return self.builder.add(address, ir.Constant(_LONG, amount))


def combiner(rows: int, *, half: bool) -> Any:
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


def float_combiner(rows: int) -> Any:
    """Return what adds P V to `rows` rows and `WIDTH` columns, all float32."""

    @intrinsic  # type: ignore[untyped-decorator]
    def combine(_context: Any, p: Any, p_row: Any, v: Any, v_row: Any, depth: Any, to: Any, to_row: Any) -> Any:
        """V has `depth` rows. All are addresses, or bytes from row to row."""

        def build(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            p, p_row, v, v_row, depth, to, to_row = arguments
            tile = _Tile(builder)
            sums = tile.sums(2 * rows)
            with cgutils.for_range(builder, depth) as loop:
                above = builder.add(v, builder.mul(loop.index, v_row))
                values = [tile.load(tile.plus(above, 64 * part), _FLOATS) for part in range(2)]
                at = builder.add(p, builder.shl(loop.index, ir.Constant(_LONG, 2)))
                for row in range(rows):
                    factor = tile.spread(tile.load(at, _FLOAT), _FLOATS)
                    for part in range(2):
                        tile.add_product(sums[2 * row + part], factor, values[part])
                    at = builder.add(at, p_row)
            for row in range(rows):
                for part in range(2):
                    at = tile.plus(to, 64 * part)
                    tile.store(builder.fadd(tile.load(at, _FLOATS), builder.load(sums[2 * row + part])), at)
                to = builder.add(to, to_row)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), build

    return combine


def dotter(*, half: bool, rounded: bool = False) -> Any:
    """Return what writes the products of four rows with four others, of bfloat16 (`half`) or float32.

    They are float32, or `rounded` to bfloat16.
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def dots(
        _context: Any, x0: Any, x1: Any, x2: Any, x3: Any, w0: Any, w1: Any, w2: Any, w3: Any, blocks: Any, to: Any,
        to_row: Any,
    ) -> Any:  # fmt: skip
        """All are addresses of rows, `blocks` vectors of 64 bytes long."""

        def build(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            rows, others, (blocks, to, to_row) = arguments[:4], arguments[4:8], arguments[8:]
            tile = _Tile(builder)
            sums = tile.sums(16)
            with cgutils.for_range(builder, blocks) as loop:
                offset = builder.shl(loop.index, ir.Constant(_LONG, 6))
                left = [tile.load_vector(builder.add(row, offset), half=half) for row in rows]
                for column, other in enumerate(others):
                    right = tile.load_vector(builder.add(other, offset), half=half)
                    for row in range(4):
                        (tile.add_pairs if half else tile.add_product)(sums[4 * row + column], left[row], right)
            for row in range(4):
                four = _across(tile, [builder.load(place) for place in sums[4 * row : 4 * row + 4]])
                if rounded:
                    four = builder.bitcast(builder.fptrunc(four, _FOUR_BFLOATS), _FOUR_HALVES)
                tile.store(four, to)
                to = builder.add(to, to_row)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 11), build

    return dots


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
