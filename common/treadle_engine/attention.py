"""Attention over one packed token stream, where no sequence sees another.

transformers calls the function registered here once per layer; it hands the layer's queries, keys and values to
the `AttentionPlan` of the current pass. A plan knows sequence boundaries (training) or caches (decoding); it does
not know LoRA, losses or the model.
"""

# Shape suffix legend
#   T = packed tokens, P = T plus padding rows, L = tokens of one sequence, d = head dimension
#   H = query heads, G = key/value heads, S = query heads that share a key head (H / G)

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from treadle_engine.attention_cpu import Sequences, packed_causal
from treadle_engine.errors import EngineError

IMPLEMENTATION = "treadle"
"""Name under which the packed attention is registered with transformers."""


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

    @contextmanager
    def using(self, plan: AttentionPlan | None, num_tokens: int) -> Iterator[None]:
        """Let modules attend by `plan` to so many real rows."""
        before = self.plan, self.num_tokens
        self.plan, self.num_tokens = plan, num_tokens
        try:
            yield
        finally:
            self.plan, self.num_tokens = before

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
        self._sequences = Sequences(self._lengths)
        self._device = torch.device(device)
        self._cumulative: Tensor | None = None
        if self._device.type == "cuda":
            starts = torch.tensor([0, *self._lengths], dtype=torch.int32)
            self._cumulative = starts.cumsum(0, dtype=torch.int32).to(self._device)

    def attend(
        self, layer: int, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """Attend causally within each sequence; by products or a call of each on a CPU, one call in all on CUDA."""
        # The varlen kernel is written for half precision; float32 on CUDA takes the loop below.
        if self._cumulative is not None and q_THd.dtype != torch.float32:
            return self._varlen(self._cumulative, q_THd, k_TGd, v_TGd, scale, window)
        # Each sequence by itself, however many share a call: a result can then not depend on who else is in the stream.
        lengths = self._lengths
        unlimited = window is None or window >= max(lengths)
        if self._device.type == "cpu" and unlimited and q_THd.shape[2] == v_TGd.shape[2]:
            return packed_causal(q_THd, k_TGd, v_TGd, self._sequences, scale)
        streams = (torch.split(stream, list(lengths)) for stream in (q_THd, k_TGd, v_TGd))
        return torch.cat([_causal(q, k, v, scale, window) for q, k, v in zip(*streams, strict=True)])

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
