"""Attention of one decoding step: fresh prompts, prompts that go on, and sequences that add one token.

A fresh prompt is attended to as in training, so its numbers are those of the trainer. Every shape that a kernel
sees follows from a sequence's own length, never from the company. This module does not know tokens or adapters.
"""

# Shape suffix legend
#   T = rows of the step, U = rows of one prompt's part, E = positions up to the part's end, S = sequences of one slab
#   H = query heads, G = key/value heads, J = query heads per key/value head, C = capacity, d = head dimension

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from treadle_engine.attention import PackedCausal
from treadle_engine.kv_cache import PromptCache, Slab, Slot


@dataclass(frozen=True)
class PromptPart:
    """The next `count` tokens of a prompt; those before are in its cache."""

    cache: PromptCache
    count: int


class _SlabRows:
    """The sequences of one slab in this step: which rows of the step they are and what each may see."""

    def __init__(self, slab: Slab, row_of: dict[int, int], device: torch.device) -> None:
        self.slab = slab
        self.rows_S = torch.tensor([row_of[id(slot)] for slot in slab.slots], device=device)
        self.places_S = torch.tensor([slot.length for slot in slab.slots], device=device)
        self._slots_S = torch.arange(len(slab.slots), device=device)
        self._masks: dict[int | None, Tensor] = {}

    def attend(
        self, layer: int, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """Append the rows' keys and values, and return o_SHd."""
        count, heads, width = self.rows_S.shape[0], q_THd.shape[1], q_THd.shape[2]
        k_SGCd, v_SGCd = self.slab.kv_Y2SGCd[layer, 0, :count], self.slab.kv_Y2SGCd[layer, 1, :count]
        k_SGCd[self._slots_S, :, self.places_S] = k_TGd[self.rows_S]
        v_SGCd[self._slots_S, :, self.places_S] = v_TGd[self.rows_S]
        # The query heads that share a key/value head stand in for its queries: no key is copied.
        q_SGJd = q_THd[self.rows_S].view(count, k_SGCd.shape[1], heads // k_SGCd.shape[1], width)
        o_SGJd = F.scaled_dot_product_attention(
            q_SGJd, k_SGCd, v_SGCd, attn_mask=self._mask(window, q_THd.dtype), scale=scale
        )
        return o_SGJd.reshape(count, heads, width)

    def _mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        if window not in self._masks:
            columns_C = torch.arange(self.slab.capacity, device=self.places_S.device)
            hidden_SC = columns_C > self.places_S[:, None]
            if window is not None:
                hidden_SC |= columns_C <= self.places_S[:, None] - window
            zeros_SC = torch.zeros(hidden_SC.shape, dtype=dtype, device=hidden_SC.device)
            self._masks[window] = zeros_SC.masked_fill_(hidden_SC, -torch.inf)[:, None, None, :]
        return self._masks[window]


class DecodeAttention:
    """The `AttentionPlan` of one step over fresh parts, later parts and single tokens, in this order of rows."""

    def __init__(
        self, parts: Sequence[PromptPart], slots: Sequence[Slot], slabs: Sequence[Slab], device: torch.device
    ) -> None:
        """Plan; `slots` are in row order and are all the slots of `slabs`. Fresh parts come first in `parts`."""
        fresh = [part for part in parts if part.cache.length == 0]
        self._parts = parts
        self._num_fresh = sum(part.count for part in fresh)
        self._later = parts[len(fresh) :]
        self._packed = PackedCausal([part.count for part in fresh], device) if fresh else None
        self._first_row = sum(part.count for part in parts)
        row_of = {id(slot): self._first_row + row for row, slot in enumerate(slots)}
        self._slabs = [_SlabRows(slab, row_of, device) for slab in slabs]

    def attend(
        self, layer: int, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """Fill the caches of this layer and return o_THd."""
        o_THd = torch.empty_like(q_THd)
        self._fill(layer, k_TGd, v_TGd)
        if self._packed is not None:
            rows = slice(0, self._num_fresh)
            o_THd[rows] = self._packed.attend(layer, q_THd[rows], k_TGd[rows], v_TGd[rows], scale, window)
        start = self._num_fresh
        for part in self._later:
            rows = slice(start, start + part.count)
            o_THd[rows] = _attend_later(part, layer, q_THd[rows], scale, window)
            start = rows.stop
        for slab in self._slabs:
            o_THd[slab.rows_S] = slab.attend(layer, q_THd, k_TGd, v_TGd, scale, window)
        return o_THd

    def _fill(self, layer: int, k_TGd: Tensor, v_TGd: Tensor) -> None:
        start = 0
        for part in self._parts:
            rows, places = slice(start, start + part.count), slice(part.cache.length, part.cache.length + part.count)
            part.cache.kv_Y2GLd[layer, 0, :, places] = k_TGd[rows].transpose(0, 1)
            part.cache.kv_Y2GLd[layer, 1, :, places] = v_TGd[rows].transpose(0, 1)
            start = rows.stop


def _attend_later(part: PromptPart, layer: int, q_UHd: Tensor, scale: float, window: int | None) -> Tensor:
    end = part.cache.length + part.count
    k_GEd, v_GEd = part.cache.kv_Y2GLd[layer, 0, :, :end], part.cache.kv_Y2GLd[layer, 1, :, :end]
    seen_UE = torch.ones(part.count, end, dtype=torch.bool, device=q_UHd.device).tril_(part.cache.length)
    if window is not None:
        seen_UE.triu_(part.cache.length - window + 1)
    o_1HUd = F.scaled_dot_product_attention(
        q_UHd.transpose(0, 1).contiguous()[None], k_GEd[None], v_GEd[None],
        attn_mask=seen_UE, scale=scale, enable_gqa=q_UHd.shape[1] != k_GEd.shape[0],
    )  # fmt: skip
    return o_1HUd[0].transpose(0, 1)
