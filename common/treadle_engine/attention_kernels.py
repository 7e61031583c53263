"""Attention of a decoding step on a CPU with wide vectors, compiled by Numba; in bfloat16 or float32.

A row attends to the positions before it where their keys and values lie: no masks, nothing padded, nothing copied. Its
bits follow from its own query, keys and values alone, however many rows are computed together. Scores and softmax are
in float32; probabilities are rounded once, if at all. Knows addresses and sizes alone; heads are multiples of `WIDTH`
wide.
"""

# Shape suffix legend
#   Q = query rows computed together, C = positions from an even one on, d = head dimension

from __future__ import annotations

from typing import Any, Final

import numba
import numpy as np
import torch
from numba import types
from numba.extending import overload

from treadle_engine.cpu_kernels import LIKE, compiled, exponential, narrow, pointer
from treadle_engine.tiles import WIDTH, combiner, dotter, float_combiner

TILE: Final = 8
"""Query rows of a tile; fewer go in one of four."""

_ZERO, _ONE = np.float32(0.0), np.float32(1.0)
_VECTOR_BYTES: Final = 64

Array = Any  # numpy arrays; Numba types them by what they are called with

_dots_halves, _dots_floats = dotter(half=True), dotter(half=False)
_half8, _half4 = (combiner(rows, half=True) for rows in (8, 4))
_float8, _float4 = (float_combiner(rows) for rows in (8, 4))


def _dots(
    like: Array, q0: int, q1: int, q2: int, q3: int, k0: int, k1: int, k2: int, k3: int, blocks: int, to: int, row: int
) -> None:
    """Write the products of four queries with four keys; for kernels."""
    raise NotImplementedError


def _combine(like: Array, count: int, p: int, p_row: int, v: int, v_row: int, depth: int, to: int, to_row: int) -> None:
    """Add the values by the probabilities of eight or four rows; for kernels."""
    raise NotImplementedError


@overload(_dots, strict=False)  # type: ignore[untyped-decorator]
def _dots_overload(
    like: Any, q0: Any, q1: Any, q2: Any, q3: Any, k0: Any, k1: Any, k2: Any, k3: Any, blocks: Any, to: Any, row: Any
) -> Any:
    dots = _dots_halves if like.dtype == types.uint16 else _dots_floats

    def write(
        like: Any, q0: Any, q1: Any, q2: Any, q3: Any, k0: Any, k1: Any, k2: Any, k3: Any, blocks: Any, to: Any,
        row: Any,
    ) -> None:  # fmt: skip
        dots(q0, q1, q2, q3, k0, k1, k2, k3, blocks, to, row)

    return write


@overload(_combine, strict=False)  # type: ignore[untyped-decorator]
def _combine_overload(
    like: Any, count: Any, p: Any, p_row: Any, v: Any, v_row: Any, depth: Any, to: Any, to_row: Any
) -> Any:
    def halves(like: Any, count: Any, p: Any, p_row: Any, v: Any, v_row: Any, depth: Any, to: Any, to_row: Any) -> None:
        if count > 4:
            _half8(p, p_row, 4, v, v_row, depth, to, to_row, _ONE)
        else:
            _half4(p, p_row, 4, v, v_row, depth, to, to_row, _ONE)

    def floats(like: Any, count: Any, p: Any, p_row: Any, v: Any, v_row: Any, depth: Any, to: Any, to_row: Any) -> None:
        if count > 4:
            _float8(p, p_row, v, v_row, depth, to, to_row)
        else:
            _float4(p, p_row, v, v_row, depth, to, to_row)

    return halves if like.dtype == types.uint16 else floats


@compiled(fastmath={"contract"}, error_model="numpy")
def _exponentials(score_C: Array, top: Any, scale: Any) -> None:
    """Replace scores by e^(scale * (score - top)), which is at most 1."""
    for i in range(len(score_C)):
        x = (score_C[i] - top) * scale
        # What is no number stays none.
        score_C[i] = exponential(x) + (x - x)


@compiled(fastmath={"reassoc"})
def _total(value_C: Array) -> Any:
    total = _ZERO
    for i in range(len(value_C)):
        total += value_C[i]
    return total


@compiled(fastmath={"nnan", "nsz"})
def _largest(value_C: Array) -> Any:
    top = value_C[0]
    for i in range(len(value_C)):
        top = max(top, value_C[i])
    return top


@compiled()
def _scaled(value_C: Array, factor: Any, to_C: Array) -> None:
    """Write factor * value, rounded to what it is written to."""
    for i in range(len(value_C)):
        to_C[i] = narrow(value_C[i] * factor, to_C)


@compiled()
def _copy(like: Array, source: int, to: int, count: int) -> None:
    source_C, to_C = numba.carray(pointer(source, like), (count,)), numba.carray(pointer(to, like), (count,))
    for i in range(count):
        to_C[i] = source_C[i]


@compiled()
def _tile(
    queries: Array, count: int, lengths: Array, first: int, longest: int, k: int, v: int, width: int, scale: Any,
    score_QC: Array, prob_QC: Array, out_Qd: Array,
) -> None:  # fmt: skip
    """Attend with `count` of up to eight queries (addresses; those behind repeat the last) from position `first` on."""
    row = prob_QC.itemsize * width
    score, score_row = score_QC.ctypes.data, 4 * score_QC.shape[1]
    span = longest - first
    for q in range(0, TILE if count > 4 else 4, 4):
        q0, q1, q2, q3 = queries[q], queries[q + 1], queries[q + 2], queries[q + 3]
        for c in range(0, span, 4):
            k0, k1 = k + (first + c) * row, k + min(first + c + 1, longest - 1) * row
            k2, k3 = k + min(first + c + 2, longest - 1) * row, k + min(first + c + 3, longest - 1) * row
            _dots(
                prob_QC, q0, q1, q2, q3, k0, k1, k2, k3, row // _VECTOR_BYTES, score + q * score_row + 4 * c, score_row
            )
    for q in range(count):
        # Of a window's first pair, one may be out of sight.
        begin, end = lengths[q, 0] - first, lengths[q, 1] - first
        seen_C = score_QC[q, begin:end]
        _exponentials(seen_C, _largest(seen_C), scale)
        prob_QC[q, :begin] = 0
        _scaled(seen_C, _ONE / _total(seen_C), prob_QC[q, begin:end])
        # An odd number's last is paired with nothing, whose factor must be a number all the same.
        prob_QC[q, end : span + 1] = 0
    out_Qd[:] = 0
    prob, prob_row, out = prob_QC.ctypes.data, prob_QC.itemsize * prob_QC.shape[1], out_Qd.ctypes.data
    step = prob_QC.itemsize * WIDTH
    for column in range(0, row, step):
        _combine(prob_QC, count, prob, prob_row, v + first * row + column, row, span, out + column, row)


@compiled()
def append(like: Array, tasks: Array, caches: Array, layer: int, groups: int, width: int, streams: Array) -> None:
    """Append the keys and values of each task's rows to its cache; all is as in `attend`."""
    row = like.itemsize * width
    for task in range(len(tasks)):
        start, rows, position = tasks[task]
        for which in range(2):
            source, source_row = streams[1 + which]
            for group in range(groups):
                to = caches[task, 0] + layer * caches[task, 1] + which * caches[task, 2] + group * caches[task, 3]
                for u in range(rows):
                    _copy(like, source + (start + u) * source_row + group * row, to + (position + u) * row, width)


@compiled()
def attend(
    like: Array, tasks: Array, caches: Array, layer: int, heads: int, groups: int, width: int, window: int, scale: Any,
    streams: Array, score_QC: Array, prob_QC: Array, out_Qd: Array,
) -> None:  # fmt: skip
    """Write what the queries of each task's rows attend to, their own position included.

    A task is (first row, rows, position of the first), its cache (address, bytes from layer to layer, from keys to
    values, from head to head); streams q, k, v and o are (address, bytes from row to row). No window if it is 0.
    """
    shared, row = heads // groups, like.itemsize * width
    queries, places, lengths = np.empty(TILE, np.int64), np.empty(TILE, np.int64), np.empty((TILE, 2), np.int64)
    for task in range(len(tasks)):
        start, rows, position = tasks[task]
        for group in range(groups):
            k = caches[task, 0] + layer * caches[task, 1] + group * caches[task, 3]
            v = k + caches[task, 2]
            for at in range(0, rows * shared, TILE):
                count = min(TILE, rows * shared - at)
                longest = 0
                for q in range(TILE):
                    u, head = divmod(min(at + q, rows * shared - 1), shared)
                    offset = (group * shared + head) * row
                    queries[q] = streams[0, 0] + (start + u) * streams[0, 1] + offset
                    places[q] = streams[3, 0] + (start + u) * streams[3, 1] + offset
                    longest = position + u + 1
                    lengths[q, 0] = max(0, longest - window) if window else 0
                    lengths[q, 1] = longest
                first = lengths[0, 0] // 2 * 2
                _tile(queries, count, lengths, first, longest, k, v, width, scale, score_QC, prob_QC, out_Qd)
                for q in range(count):
                    _copy(like, out_Qd[q].ctypes.data, places[q], width)


def compile_kernels(dtype: torch.dtype) -> None:
    """Compile the kernels for a base of float32 or bfloat16, or load them from disk."""
    tasks, caches, streams = np.empty((0, 3), np.int64), np.empty((0, 4), np.int64), np.empty((4, 2), np.int64)
    like = LIKE[dtype]
    rows = np.empty((TILE, WIDTH), like.dtype)
    append(like, tasks, caches, 0, 1, WIDTH, streams)
    attend(like, tasks, caches, 0, 1, 1, WIDTH, 0, _ONE, streams, np.empty((TILE, WIDTH), np.float32), rows, rows)
