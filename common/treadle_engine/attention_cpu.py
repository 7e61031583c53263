"""Causal attention of packed sequences on a CPU, with a backward of its own.

All short sequences go together, by grouped products in float32, where there are such. The others, or all, go one after
the other: forward by torch's fused kernel, whose backward takes several times as long in bfloat16 as in float32 below a
few hundred tokens, and in either is slower than plain products from there on. So that is float32 throughout: the fused
kernel for short sequences, blocks of query rows for long ones. Knows nothing of models or passes.
"""

# Shape suffix legend
#   T = packed tokens, L = tokens of one sequence, N = query rows of a block, E = keys up to the block's end
#   H = query heads, G = key/value heads, S = query heads that share a key head (H / G), d = head dimension

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from treadle_engine.attention_short import Heads, ShortAttention

# Asked directly, a sequence costs no autograd graph and no copy of shared key heads.
_FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_FUSED_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_SOFTMAX_BACKWARD = torch.ops.aten._softmax_backward_data.default

_GROUPED = 512
"""Tokens up to which sequences go together, where they can. Beyond, it gains little: products are large by then."""
_LONG = 192
"""Tokens from which the backward of a sequence by itself goes by blocks (measured)."""
_BLOCK = 64
"""Query rows of a block: what it computes above the diagonal is thrown away."""


class Sequences:
    """Where the sequences of a stream lie, and what its short ones have in common in all layers."""

    def __init__(self, lengths: Sequence[int]) -> None:
        """Take the lengths of sequences that follow each other."""
        self.lengths = list(lengths)
        self._short: dict[Heads, ShortAttention | None] = {}

    def short(self, heads: Heads) -> ShortAttention | None:
        """Return the attention of the short sequences together, None where all go one by one."""
        if heads not in self._short:
            starts = [end - length for end, length in zip(accumulate(self.lengths), self.lengths, strict=True)]
            short = [(start, length) for start, length in zip(starts, self.lengths, strict=True) if length <= _GROUPED]
            grouped = bool(short) and ShortAttention.serves(heads.width)
            self._short[heads] = ShortAttention(short, heads) if grouped else None
        return self._short[heads]


def packed_causal(q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, sequences: Sequences, scale: float) -> Tensor:
    """Return o_THd, each of the sequences attending to itself alone."""
    o_THd: Tensor = _PackedCausal.apply(q_THd, k_TGd, v_TGd, sequences, scale)  # type: ignore[no-untyped-call]
    return o_THd


class _PackedCausal(torch.autograd.Function):
    """All sequences of the stream as one node."""

    @staticmethod
    def forward(ctx: Any, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, sequences: Sequences, scale: float) -> Tensor:
        kept: list[Tensor] = []
        short = sequences.short(Heads(q_THd.shape[1], k_TGd.shape[1], q_THd.shape[2], scale))
        o_THd = torch.empty_like(q_THd, memory_format=torch.contiguous_format)
        if short is not None:
            o_float = o_THd if o_THd.dtype == torch.float32 else torch.empty(o_THd.shape)
            short.forward([stream.float().contiguous() for stream in (q_THd, k_TGd, v_TGd)], o_float)
            o_THd.copy_(o_float)
        if short is None or max(sequences.lengths) > _GROUPED:
            streams = (torch.split(stream, sequences.lengths) for stream in (q_THd, k_TGd, v_TGd, o_THd))
            for q_LHd, k_LGd, v_LGd, o_LHd in zip(*streams, strict=True):
                if short is not None and q_LHd.shape[0] <= _GROUPED:
                    continue
                o_SGLd, sum_SGL = _FUSED(*_heads(q_LHd, k_LGd, v_LGd), 0.0, True, scale=scale)
                _by_group(o_LHd, k_LGd.shape[1]).copy_(o_SGLd)
                if q_LHd.shape[0] < _LONG:
                    kept += [o_SGLd, sum_SGL]
        ctx.save_for_backward(q_THd, k_TGd, v_TGd, *kept)
        ctx.lengths, ctx.short, ctx.scale = sequences.lengths, short, scale
        return o_THd

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q_THd, k_TGd, v_TGd, *kept = ctx.saved_tensors
        streams = [stream.float().contiguous() for stream in (grad_outputs[0], q_THd, k_TGd, v_TGd)]
        totals = [torch.empty_like(stream) for stream in streams[1:]]
        if ctx.short is not None:
            ctx.short.backward(streams, totals)
        left = iter(kept)
        if ctx.short is None or max(ctx.lengths) > _GROUPED:
            for pieces in zip(*(torch.split(stream, ctx.lengths) for stream in (*streams, *totals)), strict=True):
                own, into = pieces[:4], pieces[4:]
                if ctx.short is not None and own[0].shape[0] <= _GROUPED:
                    continue
                if own[0].shape[0] < _LONG:
                    _fused_backward(own, next(left), next(left), into, ctx.scale)
                else:
                    _blocked_backward(own, into, ctx.scale)
        dtype = q_THd.dtype
        gq_THd, gk_TGd, gv_TGd = (total.to(dtype) for total in totals)
        return gq_THd, gk_TGd, gv_TGd, None, None


def _heads(q_LHd: Tensor, k_LGd: Tensor, v_LGd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """View one sequence as [S, G, L, d]: query heads that share a key head lie in the kernel's batch."""
    groups = k_LGd.shape[1]
    shared = q_LHd.shape[1] // groups
    k_SGLd, v_SGLd = (x_LGd.transpose(0, 1).expand(shared, -1, -1, -1) for x_LGd in (k_LGd, v_LGd))
    return _by_group(q_LHd, groups), k_SGLd, v_SGLd


def _by_group(x_LHd: Tensor, groups: int) -> Tensor:
    """View [L, H, d] as [S, G, L, d]."""
    length, heads, width = x_LHd.shape
    return x_LHd.view(length, groups, heads // groups, width).permute(2, 1, 0, 3)


def _fused_backward(
    own: Sequence[Tensor], o_SGLd: Tensor, sum_SGL: Tensor, into: Sequence[Tensor], scale: float
) -> None:
    """Write the gradients of one sequence by torch's kernel; `own` is its (g, q, k, v), `into` its (gq, gk, gv)."""
    g_LHd, (gq_LHd, gk_LGd, gv_LGd) = own[0], into
    groups = gk_LGd.shape[1]
    q_SGLd, k_SGLd, v_SGLd = _heads(*own[1:])
    gq, gk, gv = _FUSED_BACKWARD(
        _by_group(g_LHd, groups), q_SGLd, k_SGLd, v_SGLd, o_SGLd.float(), sum_SGL, 0.0, True, scale=scale
    )
    _by_group(gq_LHd, groups).copy_(gq)
    torch.sum(gk, 0, out=gk_LGd.transpose(0, 1))
    torch.sum(gv, 0, out=gv_LGd.transpose(0, 1))


def _blocked_backward(own: Sequence[Tensor], into: Sequence[Tensor], scale: float) -> None:
    """Write the gradients of one sequence block by block; scores are computed again, none are kept.

    With P = softmax(scale q k^T): gv = P^T g, gs = P * (g v^T - rowsum(P * g v^T)), gq = scale gs k, gk = scale gs^T q.
    """
    g_LHd, q_LHd, k_LGd, v_LGd = own
    length, heads, width = q_LHd.shape
    groups = k_LGd.shape[1]
    shared = heads // groups
    # Scaled queries serve the scores and the keys' gradient.
    q_GSLd, g_GSLd = (_by_group(x, groups).transpose(0, 1) for x in (q_LHd * scale, g_LHd))
    k_GLd, v_GLd = k_LGd.transpose(0, 1).contiguous(), v_LGd.transpose(0, 1).contiguous()
    gk_GLd, gv_GLd = torch.zeros_like(k_GLd), torch.zeros_like(v_GLd)
    gq_GSLd = _by_group(into[0], groups).transpose(0, 1)
    for start in range(0, length, _BLOCK):
        end = min(start + _BLOCK, length)
        rows = end - start
        q_GNd, g_GNd = (x[:, :, start:end].reshape(groups, shared * rows, width) for x in (q_GSLd, g_GSLd))
        scores_GNE = torch.bmm(q_GNd, k_GLd[:, :end].transpose(1, 2))
        scores_GNE.view(groups, shared, rows, end)[..., start:].add_(_above_diagonal(rows))
        p_GNE = torch.softmax(scores_GNE, dim=-1)
        gs_GNE = _SOFTMAX_BACKWARD(torch.bmm(g_GNd, v_GLd[:, :end].transpose(1, 2)), p_GNE, -1, torch.float32)
        gv_GLd[:, :end].baddbmm_(p_GNE.transpose(1, 2), g_GNd)
        gk_GLd[:, :end].baddbmm_(gs_GNE.transpose(1, 2), q_GNd)
        gq_GSLd[:, :, start:end] = torch.bmm(gs_GNE, k_GLd[:, :end]).view(groups, shared, rows, width)
    into[0].mul_(scale)
    into[1].copy_(gk_GLd.transpose(0, 1))
    into[2].copy_(gv_GLd.transpose(0, 1))


@lru_cache(maxsize=_BLOCK)
def _above_diagonal(rows: int) -> Tensor:
    """Return [rows, rows] with -inf where a key comes after its query, else 0."""
    return torch.full((rows, rows), float("-inf")).triu_(1)
