"""Attention over one packed token stream, where no sequence sees another.

transformers calls the function registered here once per layer; it hands the layer's queries, keys and values to
the `AttentionPlan` of the current pass. A plan knows sequence boundaries (training) or caches (decoding); it does
not know LoRA, losses or the model.
"""

# Shape suffix legend
#   T = packed tokens, P = T plus padding rows, L = tokens of one sequence, M = L times query heads per group
#   H = query heads, G = key/value heads, d = head dimension

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from treadle_engine.errors import EngineError

IMPLEMENTATION = "treadle"
"""Name under which the packed attention is registered with transformers."""

# Up to this length the probabilities of all heads are small enough to keep for the backward.
_SHORT = 256


class AttentionPlan(Protocol):
    """What one pass does for attention, asked once per layer."""

    def attend(
        self, layer: int, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """Return o_THd; `window` is the number of latest positions a query may see, None for all."""
        ...


class PassContext:
    """What the modules of a base need to know about the call in progress; owned by one `BaseModel`."""

    def __init__(self) -> None:
        """Start with no call in progress."""
        self.plan: AttentionPlan | None = None
        self.num_tokens = 0

    def attend(self, module: nn.Module, q_PHd: Tensor, k_PGd: Tensor, v_PGd: Tensor, window: int | None) -> Tensor:
        """Run the plan on the real rows and give the padding rows zeros."""
        if self.plan is None:
            raise RuntimeError("attention was called outside BaseModel.hidden")
        scale = getattr(module, "scaling", None)
        scale = q_PHd.shape[-1] ** -0.5 if scale is None else float(scale)
        rows, padded = self.num_tokens, q_PHd.shape[0]
        layer = int(getattr(module, "layer_idx"))  # noqa: B009 - nn.Module types every attribute as Tensor | Module
        o_THd = self.plan.attend(layer, q_PHd[:rows], k_PGd[:rows], v_PGd[:rows], scale, window)
        return o_THd if rows == padded else F.pad(o_THd, (0, 0, 0, 0, 0, padded - rows))


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,  # whatever an architecture hands to its attention function
) -> tuple[Tensor, None]:
    """Serve transformers' attention call: [1, H, P, d] in, [1, P, H, d] out."""
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise EngineError("UNKNOWN_BASE", "attention soft-caps and attention sinks are not supported")
    context = getattr(module, "treadle_context")  # noqa: B009 - see above
    window = kwargs.get("sliding_window")
    o_PHd = context.attend(module, query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1), window)
    return o_PHd.unsqueeze(0), None


# Only the function is registered, and no mask function of that name: transformers then builds no T x T mask.
AttentionInterface.register(IMPLEMENTATION, packed_attention)


class PackedCausal:
    """Causal attention inside each of the given sequences, which follow each other in the stream."""

    def __init__(self, lengths: Sequence[int], device: torch.device | str = "cpu") -> None:
        """Remember the boundaries; `lengths` sum to the stream's T."""
        self._lengths = [int(length) for length in lengths]
        self._device = torch.device(device)
        self._cumulative: Tensor | None = None
        if self._device.type == "cuda":
            starts = torch.tensor([0, *self._lengths], dtype=torch.int32)
            self._cumulative = starts.cumsum(0, dtype=torch.int32).to(self._device)

    def attend(
        self, layer: int, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """Attend causally within each sequence; one kernel call per sequence on a CPU, one in all on CUDA."""
        # The varlen kernel is written for half precision; float32 on CUDA takes the loop below.
        if self._cumulative is not None and q_THd.dtype != torch.float32:
            return self._varlen(self._cumulative, q_THd, k_TGd, v_TGd, scale, window)
        # One call per sequence: a result can then not depend on who else is in the stream.
        # The kernel, too, is chosen by each sequence's own length. When all are short, one node serves them all.
        lengths = self._lengths
        if _fits_short(q_THd, lengths, window):
            return _short(q_THd, k_TGd, v_TGd, lengths, scale)
        streams = (torch.split(stream, lengths) for stream in (q_THd, k_TGd, v_TGd))
        parts = []
        for length, q, k, v in zip(lengths, *streams, strict=True):
            if _fits_short(q, [length], window):
                parts.append(_short(q, k, v, [length], scale))
            else:
                parts.append(_causal(q, k, v, scale, window))
        return torch.cat(parts)

    def _varlen(
        self, bounds: Tensor, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, scale: float, window: int | None
    ) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        # num_splits=1: splitting keys by the load of the batch would make results depend on the neighbours.
        longest = max(self._lengths)
        left = -1 if window is None else window - 1
        o_THd = varlen_attn(
            q_THd,
            k_TGd,
            v_TGd,
            bounds,
            bounds,
            longest,
            longest,
            scale=scale,
            window_size=(left, 0),
            enable_gqa=q_THd.shape[1] != k_TGd.shape[1],
            num_splits=1,
        )
        assert isinstance(o_THd, Tensor)  # no auxiliary output was asked for
        return o_THd


def _fits_short(q_THd: Tensor, lengths: Sequence[int], window: int | None) -> bool:
    longest = max(lengths)
    unlimited = window is None or window >= longest
    return q_THd.dtype == torch.float32 and q_THd.is_cpu and longest <= _SHORT and unlimited


def _short(q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, lengths: Sequence[int], scale: float) -> Tensor:
    o_THd: Tensor = _ShortCausal.apply(q_THd, k_TGd, v_TGd, lengths, scale)  # type: ignore[no-untyped-call]
    return o_THd


class _ShortCausal(torch.autograd.Function):
    """Causal attention of short float32 sequences by plain products: on a CPU two to three times faster than SDPA.

    Each sequence is a call of its own on freshly packed buffers, so its bits do not depend on its neighbours.
    The probabilities are kept for the backward, which is why only short sequences come here.
    """

    @staticmethod
    def forward(ctx: Any, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, lengths: Sequence[int], scale: float) -> Tensor:
        groups = k_TGd.shape[1]
        out_THd = torch.empty(q_THd.shape, dtype=q_THd.dtype)
        masks: dict[int, Tensor] = {}
        saved: list[Tensor] = []
        start = 0
        for length in lengths:
            if length not in masks:
                masks[length] = torch.full((length, length), -torch.inf).triu_(1)
            rows = slice(start, start + length)
            q_GMd = _by_group(q_THd[rows], groups)
            k_GLd, v_GLd = _by_group(k_TGd[rows], groups), _by_group(v_TGd[rows], groups)
            score_GML = torch.bmm(q_GMd, k_GLd.transpose(1, 2)).mul_(scale)
            score_GML.view(groups, -1, length, length).add_(masks[length])
            prob_GML = torch.softmax(score_GML, dim=-1)
            out_THd[rows] = _by_head(torch.bmm(prob_GML, v_GLd), length)
            saved += [q_GMd, k_GLd, v_GLd, prob_GML]
            start = rows.stop
        ctx.save_for_backward(*saved)
        ctx.lengths, ctx.scale, ctx.groups = lengths, scale, groups
        return out_THd

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        g_THd = grad_outputs[0]
        groups, saved = ctx.groups, ctx.saved_tensors
        gq_THd = torch.empty(g_THd.shape, dtype=g_THd.dtype)
        gk_TGd, gv_TGd = (torch.empty(g_THd.shape[0], groups, g_THd.shape[2], dtype=g_THd.dtype) for _ in range(2))
        start = 0
        for index, length in enumerate(ctx.lengths):
            q_GMd, k_GLd, v_GLd, prob_GML = saved[4 * index : 4 * index + 4]
            rows = slice(start, start + length)
            g_GMd = _by_group(g_THd[rows], groups)
            gv_TGd[rows] = torch.bmm(prob_GML.transpose(1, 2), g_GMd).transpose(0, 1)
            gprob_GML = torch.bmm(g_GMd, v_GLd.transpose(1, 2))
            gscore_GML = torch._softmax_backward_data(gprob_GML, prob_GML, -1, prob_GML.dtype).mul_(ctx.scale)
            gq_THd[rows] = _by_head(torch.bmm(gscore_GML, k_GLd), length)
            gk_TGd[rows] = torch.bmm(gscore_GML.transpose(1, 2), q_GMd).transpose(0, 1)
            start = rows.stop
        return gq_THd, gk_TGd, gv_TGd, None, None


def _by_group(x_LHd: Tensor, groups: int) -> Tensor:
    """Pack [L, H, d] to [G, H/G * L, d]: the query heads that share a key head become rows of one product."""
    length, heads, size = x_LHd.shape
    return x_LHd.reshape(length, groups, heads // groups, size).permute(1, 2, 0, 3).reshape(groups, -1, size)


def _by_head(x_GMd: Tensor, length: int) -> Tensor:
    """Undo `_by_group`."""
    groups, _, size = x_GMd.shape
    return x_GMd.view(groups, -1, length, size).permute(2, 0, 1, 3).reshape(length, -1, size)


def _causal(q_LHd: Tensor, k_LGd: Tensor, v_LGd: Tensor, scale: float, window: int | None) -> Tensor:
    length = q_LHd.shape[0]
    mask_LL: Tensor | None = None
    if window is not None and length > window:
        mask_LL = torch.ones(length, length, dtype=torch.bool, device=q_LHd.device).tril_().triu_(1 - window)
    o_1HLd = F.scaled_dot_product_attention(
        q_LHd.transpose(0, 1).unsqueeze(0),
        k_LGd.transpose(0, 1).unsqueeze(0),
        v_LGd.transpose(0, 1).unsqueeze(0),
        attn_mask=mask_LL,
        is_causal=mask_LL is None,
        scale=scale,
        enable_gqa=q_LHd.shape[1] != k_LGd.shape[1],
    )
    return o_1HLd[0].transpose(0, 1)
