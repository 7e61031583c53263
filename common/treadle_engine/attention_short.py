"""Causal attention of all short sequences of a stream, a few grouped products for all of them, and its backward.

The backward computes scores again, both go block by block of query rows, in float32. With P = softmax(scale q k^T):
gv = P^T g, gs = P * (g v^T - rowsum(P * g v^T)), gq = scale gs k, gk = scale gs^T q. A sequence's bits follow from its
own rows: each of its products is one of a grouped call, and rows of scores are as wide as its own blocks make them.
"""

# Shape suffix legend
#   T = packed tokens, L = tokens of one sequence, N = query rows of a block, E = keys up to a block's end, padded
#   H = query heads, G = key/value heads, d = head dimension, R = all N of the blocks with one E (for all heads)

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from treadle_engine.grouped_gemm import ALIGNED_VALUES, Products, TimesTransposed, available

_SOFTMAX_BACKWARD = torch.ops.aten._softmax_backward_data.default
_BYTES: Final = 4
_BLOCK: Final = 64
"""Query rows of a block: what it computes above the diagonal is thrown away."""
_WIDTH: Final = 32
"""Rows of scores are as wide as a multiple of this."""


class _Block(NamedTuple):
    """Query rows [row, row + rows) of the stream, of the sequence that begins at row `first`."""

    first: int
    row: int
    rows: int
    end: int
    """Keys up to the block's end."""
    is_last: bool
    """Whether the sequence ends with it."""


@dataclass(frozen=True)
class Heads:
    """Query heads, key/value heads, the values of each, and the factor on scores."""

    queries: int
    keys: int
    width: int
    scale: float


class ShortAttention:
    """Attention within some sequences of a stream, for any number of layers."""

    def __init__(self, sequences: Sequence[tuple[int, int]], heads: Heads) -> None:
        """Take the sequences by their first rows in the stream and their lengths."""
        parts: dict[int, list[_Block]] = {}
        for start, length in sequences:
            for row in range(0, length, _BLOCK):
                end = min(row + _BLOCK, length)
                block = _Block(start, start + row, end - row, end, is_last=end == length)
                parts.setdefault(-(-end // _WIDTH) * _WIDTH, []).append(block)
        # The widest first: a sequence's last block, which sees all of its keys, is the one that begins their gradients.
        self._parts = [_Part(parts[wide], wide, heads) for wide in sorted(parts, reverse=True)]

    @staticmethod
    def serves(width: int) -> bool:
        """Tell whether heads of `width` values can be had this way here."""
        return width % ALIGNED_VALUES == 0 and available()

    def forward(self, own: Sequence[Tensor], o_THd: Tensor) -> None:
        """Write the sequences' rows of `o_THd`; `own` is the stream's (q, k, v), as in `backward`."""
        for part in self._parts:
            part.forward(own, o_THd)

    def backward(self, own: Sequence[Tensor], into: Sequence[Tensor]) -> None:
        """Write the sequences' rows of `into`, (gq_THd, gk_TGd, gv_TGd); `own` is the stream's (g, q, k, v).

        All are float32 and contiguous, and begin at multiples of 16 bytes.
        """
        for part in self._parts:
            part.backward(own, into)


class _Part:
    """The blocks whose scores are of one width, at most one of each sequence."""

    def __init__(self, blocks: Sequence[_Block], wide: int, heads: Heads) -> None:
        self._shared = heads.queries // heads.keys
        # [query heads that share a key head, key heads, blocks], as flat arrays of one product each.
        key = np.arange(heads.keys, dtype=np.int64)[:, None]
        query = key * self._shared + np.arange(self._shared, dtype=np.int64)[:, None, None]
        first, row, rows, end, is_last = (np.array(column) for column in zip(*blocks, strict=True))
        self._bias_1RE = _hidden(row - first, rows, wide)[None]
        self._heads = heads.queries
        at_q = (row * heads.queries + query) * heads.width
        shape = at_q.shape
        self._at_q = (_BYTES * at_q).ravel()
        self._at_k = (_BYTES * np.broadcast_to((first * heads.keys + key) * heads.width, shape)).ravel()
        rows, end = (np.broadcast_to(array, shape).ravel() for array in (rows, end))
        self._at_scores = _BYTES * wide * (np.cumsum(rows) - rows)
        q_row, k_row = heads.queries * heads.width, heads.keys * heads.width
        count = len(rows)
        self._scores, self._slopes = (
            TimesTransposed(
                count, m=rows, n=end, k=heads.width, lda=q_row, ldb=k_row, ldc=wide, alpha=alpha, beta=beta
            )
            for alpha, beta in ((heads.scale, 1.0), (1.0, 0.0))
        )  # fmt: skip
        self._to_q, self._to_o = (
            Products(count, m=rows, n=heads.width, k=end, lda=wide, ldb=k_row, ldc=q_row, alpha=alpha)
            for alpha in (heads.scale, 1.0)
        )
        each = slice(0, count // self._shared)
        # What is not a sequence's last block, and every further query head, adds to what is there.
        begins = np.broadcast_to(np.where(is_last, 0.0, 1.0), shape).ravel()[each]
        self._to_k, self._to_v = (
            [
                Products(
                    each.stop, m=end[each], n=heads.width, k=rows[each], lda=wide, ldb=q_row, ldc=k_row,
                    transpose_a=True, alpha=alpha, beta=beta,
                )
                for beta in (begins, 1.0)[: self._shared]
            ]
            for alpha in (heads.scale, 1.0)
        )  # fmt: skip

    def forward(self, own: Sequence[Tensor], o_THd: Tensor) -> None:
        """Write to `o_THd`, as `ShortAttention.forward`."""
        q, k, v = (stream.data_ptr() for stream in own)
        p_RE = self._softmax(q, k)
        self._to_o.multiply(p_RE.data_ptr() + self._at_scores, v + self._at_k, o_THd.data_ptr() + self._at_q)

    def backward(self, own: Sequence[Tensor], into: Sequence[Tensor]) -> None:
        """Write or add to `into`, as `ShortAttention.backward`."""
        g, q, k, v = (stream.data_ptr() for stream in own)
        gq, gk, gv = (stream.data_ptr() for stream in into)
        at_q, at_k, at_scores = self._at_q, self._at_k, self._at_scores
        p_RE = self._softmax(q, k)
        gp_RE = torch.zeros_like(p_RE)
        self._slopes.multiply(g + at_q, v + at_k, gp_RE.data_ptr() + at_scores)
        gs_RE = _SOFTMAX_BACKWARD(gp_RE, p_RE, -1, torch.float32)
        self._to_q.multiply(gs_RE.data_ptr() + at_scores, k + at_k, gq + at_q)
        each = len(at_q) // self._shared
        for number in range(self._shared):
            head = slice(number * each, (number + 1) * each)
            which = min(number, 1)
            self._to_v[which].multiply(p_RE.data_ptr() + at_scores[head], g + at_q[head], gv + at_k[head])
            self._to_k[which].multiply(gs_RE.data_ptr() + at_scores[head], q + at_q[head], gk + at_k[head])

    def _softmax(self, q: int, k: int) -> Tensor:
        """Return P [R, E] of streams at these addresses."""
        p_RE = torch.empty(self._heads, *self._bias_1RE.shape[1:]).copy_(self._bias_1RE).flatten(0, 1)
        self._scores.multiply(q + self._at_q, k + self._at_k, p_RE.data_ptr() + self._at_scores)
        return torch.softmax(p_RE, dim=-1, out=p_RE)


def _hidden(begins: NDArray[np.int64], rows: NDArray[np.int64], wide: int) -> Tensor:
    """Return -inf where a key comes after its query's place, else 0, for blocks of `rows` places from `begins` on."""
    starts = np.cumsum(rows) - rows
    places = np.repeat(begins - starts, rows) + np.arange(rows.sum())
    hidden = np.arange(wide) > places[:, None]
    return torch.zeros(hidden.shape).masked_fill_(torch.from_numpy(hidden), float("-inf"))
