"""Kernels of a decoding step on a CPU, compiled by Numba when they are first called.

A step has few rows and many adapters: torch would take a dozen small calls for what is one pass here. A row's bits
follow from its own numbers alone: every sum runs in an order that its own sizes fix, over tiles that are filled up and
never change shape. Sums are in float32; tensors are float32 or bfloat16, given by address. Knows numbers alone: no
tensors, adapters or sequences.
"""

# Shape suffix legend
#   I = in features, O = out features, R = rank, S = R times the sites of a group, T = 4 rows of a tile
#   D = hidden, d = head dimension, F = features between gate/up and down

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, cast

import numba
import numpy as np
import torch
from numba import types
from numba.extending import intrinsic, overload
from numpy.typing import NDArray

LIKE: Final[dict[torch.dtype, NDArray[Any]]] = {
    torch.float32: np.empty(0, np.float32),
    torch.bfloat16: np.empty(0, np.uint16),
}
"""What stands for a dtype in a kernel's arguments: an empty array of what its elements are stored as."""

TILE: Final = 4
"""Rows that are computed together."""

# Columns of B that stay in the first cache while a tile's rows go by.
_COLUMNS: Final = 512

_ZERO, _ONE = np.float32(0.0), np.float32(1.0)
_LOG2_E, _LN2_HIGH, _LN2_LOW, _LEAST = (np.float32(x) for x in (1.44269504, 0.693359375, -2.12194440e-4, -87.0))
_HALF_WORD, _ROUND, _QUIET = np.uint32(16), np.uint32(0x7FFF), np.uint16(0x7FC0)

Array = Any  # numpy arrays; Numba types them by what they are called with


# Of the files that kernels elsewhere take functions from.
_DIGEST: Final = hashlib.sha256(
    Path(__file__).read_bytes() + Path(__file__).with_name("tiles.py").read_bytes()
).hexdigest()


def compiled(**flags: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator that compiles; what was compiled is kept on disk where there is a place for it."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            kernel: Any = numba.njit(nogil=True, cache=True, **flags)(function)
            # Numba looks at the function's own file alone to see whether what was kept is out of date.
            kept = kernel._cache._cache_file
            kept._source_stamp = (kept._source_stamp, _DIGEST)
        except (RuntimeError, AttributeError):
            kernel = numba.njit(nogil=True, **flags)(function)
        return cast(Callable[..., Any], kernel)

    return decorate


@intrinsic  # type: ignore[untyped-decorator]
def pointer(_context: Any, _address: Any, like: Any) -> Any:
    """Return a pointer to elements of `like` at an address."""
    kind = types.CPointer(like.dtype)

    def build(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(kind))

    return kind(types.int64, like), build


def wide(value: Any) -> Any:
    """Return a stored number as float32; for kernels."""
    raise NotImplementedError


def narrow(value: Any, like: Any) -> Any:
    """Return a float32 as an element of `like`, rounded to even; for kernels."""
    raise NotImplementedError


@overload(wide, strict=False)  # type: ignore[untyped-decorator]
def _wide_overload(value: Any) -> Any:
    if value == types.uint16:
        return lambda value: np.uint32(np.uint32(value) << _HALF_WORD).view(np.float32)
    return lambda value: value


@overload(narrow, strict=False)  # type: ignore[untyped-decorator]
def _narrow_overload(value: Any, like: Any) -> Any:
    def half(value: Any, like: Any) -> Any:
        bits = np.float32(value).view(np.uint32)
        rounded = np.uint32(bits + _ROUND + np.uint32(np.uint32(bits >> _HALF_WORD) & np.uint32(1)))
        # Only NaN differs from itself; rounded like a number it might become one.
        return _QUIET if value != value else np.uint16(rounded >> _HALF_WORD)  # noqa: PLR0124

    return half if like.dtype == types.uint16 else lambda value, like: value


@compiled(fastmath={"contract"}, error_model="numpy")
def exponential(x: Any) -> Any:
    """Return e^x of a float32, within its range; for kernels. What is no number gives one."""
    # 2^n times a polynomial of what is left, |rest| <= ln 2 / 2 (Cody and Waite; Cephes' expf).
    power = min(max(x, _LEAST), -_LEAST)
    n = np.floor(power * _LOG2_E + np.float32(0.5))
    rest = power - n * _LN2_HIGH - n * _LN2_LOW
    p = np.float32(1.9875691500e-4)
    p = p * rest + np.float32(1.3981999507e-3)
    p = p * rest + np.float32(8.3334519073e-3)
    p = p * rest + np.float32(4.1665795894e-2)
    p = p * rest + np.float32(1.6666665459e-1)
    p = p * rest + np.float32(5.0000001201e-1)
    p = p * rest * rest + rest + _ONE
    return p * np.int32(np.int32(np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)


@compiled(fastmath={"contract", "reassoc"})
def _times_rows(x_TI: Array, w_SI: Array, low_TS: Array) -> None:
    """Write x w^T; a number's order of summing follows from I, S and its row of w."""
    x0, x1, x2, x3 = x_TI[0], x_TI[1], x_TI[2], x_TI[3]
    count, width = w_SI.shape
    pairs = count // 2 * 2
    for row in range(0, pairs, 2):
        w, v = w_SI[row], w_SI[row + 1]
        w0 = w1 = w2 = w3 = v0 = v1 = v2 = v3 = _ZERO
        for i in range(width):
            w0 += x0[i] * w[i]
            w1 += x1[i] * w[i]
            w2 += x2[i] * w[i]
            w3 += x3[i] * w[i]
            v0 += x0[i] * v[i]
            v1 += x1[i] * v[i]
            v2 += x2[i] * v[i]
            v3 += x3[i] * v[i]
        low_TS[0, row], low_TS[1, row], low_TS[2, row], low_TS[3, row] = w0, w1, w2, w3
        low_TS[0, row + 1], low_TS[1, row + 1], low_TS[2, row + 1], low_TS[3, row + 1] = v0, v1, v2, v3
    for row in range(pairs, count):
        w = w_SI[row]
        w0 = w1 = w2 = w3 = _ZERO
        for i in range(width):
            w0 += x0[i] * w[i]
            w1 += x1[i] * w[i]
            w2 += x2[i] * w[i]
            w3 += x3[i] * w[i]
        low_TS[0, row], low_TS[1, row], low_TS[2, row], low_TS[3, row] = w0, w1, w2, w3


@compiled(fastmath={"contract"})
def _add_rows(factors_TR: Array, w_RO: Array, begin: int, end: int, sum_TO: Array) -> None:
    """Add factors w to columns [begin, end) of the sums, row by row of w."""
    # As slices, whose indices count from 0: only such loops become vector instructions.
    s0, s1, s2, s3 = sum_TO[0][begin:end], sum_TO[1][begin:end], sum_TO[2][begin:end], sum_TO[3][begin:end]
    rank = len(w_RO)
    pairs = rank // 2 * 2
    for row in range(0, pairs, 2):
        w, v = w_RO[row][begin:end], w_RO[row + 1][begin:end]
        f0, f1, f2, f3 = factors_TR[0, row], factors_TR[1, row], factors_TR[2, row], factors_TR[3, row]
        g0, g1, g2, g3 = factors_TR[0, row + 1], factors_TR[1, row + 1], factors_TR[2, row + 1], factors_TR[3, row + 1]
        for o in range(len(s0)):
            x, y = w[o], v[o]
            s0[o] = s0[o] + f0 * x + g0 * y
            s1[o] = s1[o] + f1 * x + g1 * y
            s2[o] = s2[o] + f2 * x + g2 * y
            s3[o] = s3[o] + f3 * x + g3 * y
    for row in range(pairs, rank):
        w = w_RO[row][begin:end]
        f0, f1, f2, f3 = factors_TR[0, row], factors_TR[1, row], factors_TR[2, row], factors_TR[3, row]
        for o in range(len(s0)):
            x = w[o]
            s0[o] = s0[o] + f0 * x
            s1[o] = s1[o] + f1 * x
            s2[o] = s2[o] + f2 * x
            s3[o] = s3[o] + f3 * x


@compiled(fastmath={"contract"})
def _add_scaled(x_O: Array, scale: Any, y_O: Array, like: Array) -> None:
    """Add scale x to y, rounding once."""
    for column in range(len(y_O)):
        y_O[column] = narrow(wide(y_O[column]) + scale * x_O[column], like)


@compiled(fastmath={"contract"})
def add_lora(
    like: Array,
    floats: Array,
    x: int,
    width: int,
    outer: Array,
    ys: Array,
    a: Array,
    b: Array,
    starts: Array,
    stops: Array,
    ranks: Array,
    scales: Array,
    x_TI: Array,
    low_TS: Array,
    sum_TO: Array,
) -> None:
    """Add scale * B A x to rows [start, stop) of every y, for each of some products and each site of a group.

    `like` is an empty array of x's and the ys' elements (uint16 for bfloat16), `floats` one of float32. `x` and `ys`
    are the addresses of [rows, width] and, by site, [rows, outer[site]]; `a` [products] those of A's [S, I], `b`
    [sites, products] those of transposed B's [R, O]. The last three are scratch, of 4 rows at least so wide.
    """
    for product in range(len(starts)):
        rank = ranks[product]
        a_SI = numba.carray(pointer(a[product], floats), (rank * len(outer), width))
        for first in range(starts[product], stops[product], TILE):
            rows = min(TILE, stops[product] - first)
            for row in range(TILE):
                source = min(row, rows - 1) + first
                values_I = numba.carray(pointer(x + like.itemsize * width * source, like), (width,))
                for i in range(width):
                    x_TI[row, i] = wide(values_I[i])
            _times_rows(x_TI, a_SI, low_TS)
            for site in range(len(outer)):
                columns = outer[site]
                b_RO = numba.carray(pointer(b[site, product], floats), (rank, columns))
                for row in range(TILE):
                    for column in range(columns):
                        sum_TO[row, column] = _ZERO
                for begin in range(0, columns, _COLUMNS):
                    end = min(columns, begin + _COLUMNS)
                    _add_rows(low_TS[:, site * rank : (site + 1) * rank], b_RO, begin, end, sum_TO)
                for row in range(rows):
                    place = ys[site] + like.itemsize * columns * (first + row)
                    _add_scaled(sum_TO[row], scales[product], numba.carray(pointer(place, like), (columns,)), like)


@compiled(fastmath={"contract", "reassoc"}, error_model="numpy")
def _normalise_row(x_D: Array, weight_D: Array, epsilon: Any, y_D: Array, like: Array) -> None:
    squares = _ZERO
    for i in range(len(x_D)):
        x = wide(x_D[i])
        squares += x * x
    factor = _ONE / np.sqrt(squares / np.float32(len(x_D)) + epsilon)
    for i in range(len(x_D)):
        # Rounded before and after the weight, as modules of transformers do.
        y_D[i] = narrow(wide(narrow(wide(x_D[i]) * factor, like)) * wide(weight_D[i]), like)


@compiled(fastmath={"contract"})
def _add_row(x_D: Array, z_D: Array, like: Array) -> None:
    for i in range(len(x_D)):
        x_D[i] = narrow(wide(x_D[i]) + wide(z_D[i]), like)


@compiled(fastmath={"contract"})
def normalise(like: Array, x: int, z: int, rows: int, width: int, weight: int, epsilon: Any, y: int) -> None:
    """Write the root-mean-square norm of x to y, both [rows, D], after z was added to x; no z if its address is 0."""
    weight_D = numba.carray(pointer(weight, like), (width,))
    for row in range(rows):
        offset = like.itemsize * width * row
        x_D = numba.carray(pointer(x + offset, like), (width,))
        if z != 0:
            _add_row(x_D, numba.carray(pointer(z + offset, like), (width,)), like)
        _normalise_row(x_D, weight_D, epsilon, numba.carray(pointer(y + offset, like), (width,)), like)


@compiled(fastmath={"contract"})
def _rotate_head(near_d: Array, far_d: Array, cosine_d: Array, sine_d: Array, like: Array) -> None:
    half = len(near_d)
    for i in range(half):
        near, far = wide(near_d[i]), wide(far_d[i])
        near_d[i] = narrow(near * wide(cosine_d[i]) - far * wide(sine_d[i]), like)
        far_d[i] = narrow(far * wide(cosine_d[half + i]) + near * wide(sine_d[half + i]), like)


@compiled(fastmath={"contract"})
def rotate(like: Array, x: int, rows: int, heads: int, width: int, cosine: int, sine: int) -> None:
    """Turn the pairs (i, i + d/2) of every head of x [rows, H, d] in place; the factors are [rows, d]."""
    half, size = width // 2, like.itemsize
    for row in range(rows):
        cosine_d = numba.carray(pointer(cosine + size * width * row, like), (width,))
        sine_d = numba.carray(pointer(sine + size * width * row, like), (width,))
        for head in range(heads):
            place = x + size * width * (row * heads + head)
            near_d = numba.carray(pointer(place, like), (half,))
            far_d = numba.carray(pointer(place + size * half, like), (half,))
            _rotate_head(near_d, far_d, cosine_d, sine_d, like)


@compiled(fastmath={"contract"}, error_model="numpy")
def gate(like: Array, x: int, up: int, count: int) -> None:
    """Replace `count` elements x by silu(x) * up."""
    x_F = numba.carray(pointer(x, like), (count,))
    up_F = numba.carray(pointer(up, like), (count,))
    for i in range(count):
        value = wide(x_F[i])
        x_F[i] = narrow(value / (_ONE + exponential(-value)) * wide(up_F[i]), like)
