"""Target log-probabilities and their backward, tile by tile: logits of a whole batch never exist.

A tile is a few hundred rows of the unembedding. Its forward, the loss's derivative and its backward happen while
the logits are in memory. This module does not know losses: it asks a callback for dLoss/dlogprob.
"""

# Shape suffix legend
#   T = packed tokens, N = rows of a tile, B = rows of a tile that have a gradient, D = hidden, V = vocabulary
#   K = targets per position

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from treadle_engine.base_model import ROW_MULTIPLE, BaseModel
from treadle_engine.lora import Segment, Segments

# Float32 logits held at once: 28 MiB stay in a large cache and below the size (32 MiB) from which the allocator maps
# fresh pages for every request.
_TILE_VALUES = 7 * 2**20
_MAX_TILE_ROWS = 512
# Twice the widest vector of a CPU, in float32 values: a loop that is unrolled by two has no remainder.
_LANES = 32

Derivative = Callable[[slice, Tensor], Tensor | None]
"""Given a slice of the chunk's target rows and their log-probs [n, K], return dLoss/dlogprob; None: no backward."""


@dataclass
class HeadChunk:
    """One chunk's part of the head: stream rows that have a target, the targets [n, K], and what to do with them."""

    rows_N: Tensor
    targets_NK: Tensor
    segment: Segment
    derivative: Derivative


@dataclass(frozen=True)
class _Piece:
    """Rows [start, stop) of a chunk's target rows: the chunk's own cut, whatever tile it lands in."""

    chunk: HeadChunk
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


def run_head(base: BaseModel, x_TD: Tensor, chunks: Sequence[HeadChunk], g_TD: Tensor | None) -> None:
    """Hand every chunk its log-probs; where it answers with a derivative, fill g_TD and the unembedding's gradients."""
    tile_rows = max(ROW_MULTIPLE, min(_MAX_TILE_ROWS, _TILE_VALUES // base.info.vocab_size))
    summed = [] if g_TD is None else [chunk.segment for chunk in chunks]
    for segment in summed:
        segment.open_share(base.unembedding.site)
    for tile in _tiles(chunks, tile_rows):
        _run_tile(base, x_TD, tile, g_TD)
    for segment in summed:
        segment.close_share(base.unembedding.site)


def _tiles(chunks: Sequence[HeadChunk], tile_rows: int) -> Iterator[list[_Piece]]:
    """Cut each chunk by its own rows alone, then let pieces share tiles."""
    tile: list[_Piece] = []
    used = 0
    for chunk in chunks:
        total = chunk.rows_N.shape[0]
        for start in range(0, total, tile_rows):
            piece = _Piece(chunk, start, min(start + tile_rows, total))
            if used + piece.size > tile_rows:
                yield tile
                tile, used = [], 0
            tile.append(piece)
            used += piece.size
    if tile:
        yield tile


def _run_tile(base: BaseModel, x_TD: Tensor, tile: Sequence[_Piece], g_TD: Tensor | None) -> None:
    rows_N = torch.cat([piece.chunk.rows_N[piece.start : piece.stop] for piece in tile])
    targets_NK = torch.cat([piece.chunk.targets_NK[piece.start : piece.stop] for piece in tile])
    num_rows = rows_N.shape[0]
    x_PD = _padded(x_TD.index_select(0, rows_N))
    segments = _segments(tile, [piece.size for piece in tile])
    raw_PV, lows = base.unembedding.project(x_PD, segments)
    logits_NV = base.shape_logits(raw_PV[:num_rows].float())
    logprobs_NK, probs_NV = _logprobs(logits_NV, targets_NK, keep_logits=bool(base.logit_cap))
    kept: list[Tensor] = []
    slopes: list[Tensor] = []
    start = 0
    for piece in tile:
        rows = slice(start, start + piece.size)
        slope_NK = piece.chunk.derivative(slice(piece.start, piece.stop), logprobs_NK[rows])
        selected = torch.empty(0, dtype=torch.int64, device=x_TD.device)
        if slope_NK is not None and g_TD is not None:
            selected = slope_NK.any(dim=1).nonzero()[:, 0]
            slopes.append(slope_NK[selected])
        kept.append(selected)
        start = rows.stop
    if g_TD is None or not any(selected.numel() for selected in kept):
        return
    offsets = [segment.start for segment in segments]
    kept_B = torch.cat([selected + offset for selected, offset in zip(kept, offsets, strict=True)])
    if kept_B.shape[0] < num_rows:  # else everything is in place already: spare the copies
        probs_NV, targets_NK, x_PD = probs_NV[kept_B], targets_NK[kept_B], x_PD[kept_B]
        logits_NV = logits_NV[kept_B] if base.logit_cap else probs_NV
    g_BV = _logit_gradient(base, logits_NV, probs_NV, targets_NK, torch.cat(slopes))
    left = _segments(tile, [selected.numel() for selected in kept])
    if kept_B.shape[0] < num_rows:
        lows = lows.select(left, kept)
    g_PD = base.unembedding.project_backward(_padded(g_BV.to(x_TD.dtype)), x_PD, lows, left, need_input=True)
    assert g_PD is not None  # need_input
    g_TD.index_copy_(0, rows_N[kept_B], g_PD[: kept_B.shape[0]])


def _padded(x_ND: Tensor) -> Tensor:
    missing = ROW_MULTIPLE - x_ND.shape[0]
    return x_ND if missing <= 0 else F.pad(x_ND, (0, 0, 0, missing))


def _segments(tile: Sequence[_Piece], sizes: Sequence[int]) -> Segments:
    segments, start = [], 0
    for piece, size in zip(tile, sizes, strict=True):
        segments.append(replace(piece.chunk.segment, start=start, stop=start + size))
        start += size
    return Segments(segments)


def all_logprobs(logits_NV: Tensor) -> Tensor:
    """Return every log-prob of float32 logits, with the bits that `run_head` gives to targets."""
    top_N1 = logits_NV.amax(dim=-1, keepdim=True)
    return (logits_NV - top_N1).add_(_log_largest(torch.softmax(logits_NV, dim=-1)))


def token_logprobs(logits_NV: Tensor, probs_NV: Tensor, tokens_N: Tensor) -> Tensor:
    """Return the log-prob [N] of one token per row, with the bits of `all_logprobs`; `probs_NV` is the softmax."""
    top_N1 = logits_NV.amax(dim=-1, keepdim=True)
    return logits_NV.gather(1, tokens_N[:, None]).sub_(top_N1).add_(_log_largest(probs_NV))[:, 0]


def _logprobs(logits_NV: Tensor, targets_NK: Tensor, keep_logits: bool) -> tuple[Tensor, Tensor]:
    """Return the targets' log-probs [n, K] and all probabilities, which overwrite the logits unless these are kept.

    One pass of exponentials serves both: the largest probability of a row is 1 / sum(exp(logit - largest logit)).
    """
    top_N1 = logits_NV.amax(dim=-1, keepdim=True)
    logprobs_NK = logits_NV.gather(1, targets_NK.clamp(min=0)).sub_(top_N1)
    # softmax works row by row; exp over the whole tile would round by where a row lies in it.
    probs_NV = torch.softmax(logits_NV, dim=-1, out=None if keep_logits else logits_NV)
    return logprobs_NK.add_(_log_largest(probs_NV)), probs_NV


def _log_largest(probs_NV: Tensor) -> Tensor:
    """Return the log of each row's largest probability, [N, 1].

    Every row gets whole vectors of its own: the last elements of an array may go through another, scalar logarithm.
    """
    return probs_NV.amax(dim=-1, keepdim=True).repeat(1, _LANES).log_()[:, :1]


def _logit_gradient(
    base: BaseModel, logits_BV: Tensor, probs_BV: Tensor, targets_BK: Tensor, slopes_BK: Tensor
) -> Tensor:
    """Return dLoss/d(unembedding's raw output): slope * (one_hot(target) - softmax), back through cap and scale.

    It overwrites the probabilities; the logits are read only if they are capped.
    """
    g_BV = probs_BV.mul_(-slopes_BK.sum(dim=1, keepdim=True))
    g_BV.scatter_add_(1, targets_BK.clamp(min=0), slopes_BK)
    if base.logit_cap:
        g_BV.mul_(1.0 - (logits_BV / base.logit_cap).square())
    return g_BV if base.logit_scale == 1.0 else g_BV.mul_(base.logit_scale)
