"""Causal attention of packed sequences on a CPU, with a backward of its own: one sequence after the other.

The forward is torch's fused kernel. Its backward, in bfloat16, takes several times as long as in float32 below a few
hundred tokens, and in either is slower than plain products from there on. So the backward is float32 throughout: the
fused kernel for short sequences, blocks of query rows for long ones. Knows nothing of models or passes.
"""

# Shape suffix legend
#   T = packed tokens, L = tokens of one sequence, N = query rows of a block, E = keys up to the block's end
#   H = query heads, G = key/value heads, S = query heads that share a key head (H / G), d = head dimension

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

# Asked directly, a sequence costs no autograd graph and no copy of shared key heads.
_FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_FUSED_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_SOFTMAX_BACKWARD = torch.ops.aten._softmax_backward_data.default

_LONG = 192
"""Tokens from which a sequence's backward goes by blocks (measured)."""
_BLOCK = 64
"""Query rows of a block: what it computes above the diagonal is thrown away."""


def packed_causal(q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, lengths: Sequence[int], scale: float) -> Tensor:
    """Return o_THd, each of the sequences attending to itself alone."""
    o_THd: Tensor = _PackedCausal.apply(q_THd, k_TGd, v_TGd, lengths, scale)  # type: ignore[no-untyped-call]
    return o_THd


class _PackedCausal(torch.autograd.Function):
    """All sequences of the stream as one node."""

    @staticmethod
    def forward(ctx: Any, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, lengths: Sequence[int], scale: float) -> Tensor:
        kept: list[Tensor] = []
        parts: list[Tensor] = []
        streams = (torch.split(stream, list(lengths)) for stream in (q_THd, k_TGd, v_TGd))
        for q_LHd, k_LGd, v_LGd in zip(*streams, strict=True):
            q_SGLd, k_SGLd, v_SGLd = _heads(q_LHd, k_LGd, v_LGd)
            o_SGLd, sum_SGL = _FUSED(q_SGLd, k_SGLd, v_SGLd, 0.0, True, scale=scale)
            parts.append(o_SGLd.permute(2, 1, 0, 3).flatten(1, 2))
            if q_LHd.shape[0] < _LONG:
                kept += [o_SGLd, sum_SGL]
        ctx.save_for_backward(q_THd, k_TGd, v_TGd, *kept)
        ctx.lengths, ctx.scale = list(lengths), scale
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q_THd, k_TGd, v_TGd, *kept = ctx.saved_tensors
        streams = [stream.float() for stream in (grad_outputs[0], q_THd, k_TGd, v_TGd)]
        totals = [torch.empty_like(stream, memory_format=torch.contiguous_format) for stream in streams[1:]]
        left = iter(kept)
        for pieces in zip(*(torch.split(stream, ctx.lengths) for stream in (*streams, *totals)), strict=True):
            own, into = pieces[:4], pieces[4:]
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
