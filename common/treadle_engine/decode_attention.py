"""Attention of one step: parts of texts that are read, and sequences that add one token.

Both attend over the capacity that a row's own position asks for, by the same products, so that a token's numbers do
not tell whether it was read, drawn, kept from an earlier request or read again. This module does not know tokens or
adapters. On a CPU the products are written out, since the fused kernels round by the shape of the query; on CUDA the
fused kernel does the work.
"""

# Shape suffix legend
#   T = rows of the step, U = rows of a part within one capacity, S = sequences of one slab, B = products of a batch
#   H = query heads, G = key/value heads, J = query heads per key/value head, C = capacity, d = head dimension
#   W = rows of one product: J or U * J, filled up to `block_rows`

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from treadle_engine.attention import PackedCausal
from treadle_engine.kv_cache import Slab, Slot, TextCache, capacity_for


@dataclass(frozen=True)
class TextPart:
    """The next `count` tokens of a text; those before are in its cache.

    The first part of a text whose own log-probs are asked for is `packed`: attended to as a trainer does.
    """

    cache: TextCache
    count: int
    packed: bool = False


class _Masks:
    """What each of some rows may see of a capacity, by sliding window: 0 or minus infinity, [rows, 1, C]."""

    def __init__(self, places_U: Tensor, capacity: int) -> None:
        self._places_U, self._capacity = places_U, capacity
        self._made: dict[int | None, Tensor] = {}

    def of(self, window: int | None, dtype: torch.dtype) -> Tensor:
        if window not in self._made:
            columns_C = torch.arange(self._capacity, device=self._places_U.device)
            hidden_UC = columns_C > self._places_U[:, None]
            if window is not None:
                hidden_UC |= columns_C <= self._places_U[:, None] - window
            zeros_UC = torch.zeros(hidden_UC.shape, dtype=dtype, device=hidden_UC.device)
            self._made[window] = zeros_UC.masked_fill_(hidden_UC, -torch.inf)[:, None, :]
        return self._made[window]


class _PartRows:
    """Rows of one part that share a capacity."""

    def __init__(self, part: TextPart, first: int, stop: int, row: int, device: torch.device) -> None:
        self._cache = part.cache
        self._capacity = capacity_for(stop)
        self._rows = slice(row, row + stop - first)
        self._masks = _Masks(torch.arange(first, stop, device=device), self._capacity)

    def attend(self, layer: int, q_THd: Tensor, o_THd: Tensor, scale: float, window: int | None, least: int) -> None:
        k_GCd, v_GCd = self._cache.kv_Y2GCd[layer, :, :, : self._capacity]
        groups, width = k_GCd.shape[0], k_GCd.shape[2]
        q_UHd = q_THd[self._rows]
        count = q_UHd.shape[0]
        q_GUJd = q_UHd.view(count, groups, -1, width).transpose(0, 1)
        mask_U1C = self._masks.of(window, q_THd.dtype)
        heads = q_GUJd.shape[2]
        mask_1WC = mask_U1C.expand(-1, heads, -1).reshape(1, count * heads, -1)
        o_GWd = _attend(q_GUJd.reshape(groups, -1, width), k_GCd, v_GCd, mask_1WC, scale, least)
        o_THd[self._rows] = o_GWd.view(groups, count, heads, width).transpose(0, 1).reshape(count, -1, width)


class _SlabRows:
    """Neighbouring sequences of one slab in this step: which rows of the step they are and what each may see."""

    def __init__(
        self, slab: Slab, slots: Sequence[Slot], row_of: dict[int, int], groups: int, device: torch.device
    ) -> None:
        count = len(slots)
        self._kv_Y2SGCd = slab.kv_Y2SGCd[:, :, slots[0].index : slots[0].index + count]
        self._rows_S = torch.tensor([row_of[id(slot)] for slot in slots], device=device)
        places_S = torch.tensor([slot.length for slot in slots], device=device)
        # Where the rows' keys go in the slots seen as [S * G * C, d].
        lines_SG = torch.arange(count * groups, device=device).view(count, groups) * slab.capacity
        self._places = (lines_SG + places_S[:, None]).flatten()
        self._masks = _Masks(places_S, slab.capacity)

    def attend(
        self,
        layer: int,
        qkv: tuple[Tensor, Tensor, Tensor],
        o_THd: Tensor,
        scale: float,
        window: int | None,
        least: int,
    ) -> None:
        """Append the rows' keys and values, and fill their rows of o_THd."""
        q_SHd, k_SGd, v_SGd = (x_Thd.index_select(0, self._rows_S) for x_Thd in qkv)
        count, groups, width = k_SGd.shape
        k_SGCd, v_SGCd = self._kv_Y2SGCd[layer]
        k_SGCd.view(-1, width).index_copy_(0, self._places, k_SGd.view(-1, width))
        v_SGCd.view(-1, width).index_copy_(0, self._places, v_SGd.view(-1, width))
        # The query heads that share a key/value head stand in for its queries: no key is copied.
        q_BJd = q_SHd.view(count * groups, -1, width)
        mask_S1C = self._masks.of(window, q_SHd.dtype)
        mask_B1C = mask_S1C.expand(-1, groups, -1).reshape(count * groups, 1, -1)
        o_BJd = _attend(q_BJd, k_SGCd.flatten(0, 1), v_SGCd.flatten(0, 1), mask_B1C, scale, least)
        o_THd.index_copy_(0, self._rows_S, o_BJd.reshape(q_SHd.shape))


class DecodeAttention:
    """The `AttentionPlan` of one step over parts of texts and single tokens, in this order of rows."""

    def __init__(
        self,
        parts: Sequence[TextPart],
        slots: Sequence[Slot],
        slabs: Sequence[Slab],
        groups: int,
        block_rows: int,
        device: torch.device,
    ) -> None:
        """Plan; `slots` are in row order and live in `slabs`, `groups` are the base's key/value heads."""
        self._parts = parts
        self._least = block_rows
        self._part_rows: list[_PartRows] = []
        self._packed: list[tuple[slice, PackedCausal]] = []
        row = 0
        for part in parts:
            if part.packed:
                self._packed.append((slice(row, row + part.count), PackedCausal([part.count], device)))
                row += part.count
                continue
            place, end = part.cache.length, part.cache.length + part.count
            while place < end:
                stop = min(end, capacity_for(place + 1))
                self._part_rows.append(_PartRows(part, place, stop, row, device))
                row += stop - place
                place = stop
        row_of = {id(slot): row + index for index, slot in enumerate(slots)}
        self._slabs = [
            _SlabRows(slab, neighbours, row_of, groups, device)
            for slab in slabs
            for takes_part, run in itertools.groupby(slab.slots, lambda slot: id(slot) in row_of)
            if takes_part and (neighbours := list(run))
        ]

    def attend(
        self, layer: int, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """Fill the caches of this layer and return o_THd."""
        o_THd = torch.empty_like(q_THd, memory_format=torch.contiguous_format)
        self._fill(layer, k_TGd, v_TGd)
        for cut, packed in self._packed:
            o_THd[cut] = packed.attend(layer, q_THd[cut], k_TGd[cut], v_TGd[cut], scale, window)
        for rows in self._part_rows:
            rows.attend(layer, q_THd, o_THd, scale, window, self._least)
        for slab in self._slabs:
            slab.attend(layer, (q_THd, k_TGd, v_TGd), o_THd, scale, window, self._least)
        return o_THd

    def _fill(self, layer: int, k_TGd: Tensor, v_TGd: Tensor) -> None:
        start = 0
        for part in self._parts:
            rows, places = slice(start, start + part.count), slice(part.cache.length, part.cache.length + part.count)
            part.cache.kv_Y2GCd[layer, 0, :, places] = k_TGd[rows].transpose(0, 1)
            part.cache.kv_Y2GCd[layer, 1, :, places] = v_TGd[rows].transpose(0, 1)
            start = rows.stop


def _attend(q_BWd: Tensor, k_BCd: Tensor, v_BCd: Tensor, mask: Tensor, scale: float, least: int) -> Tensor:
    """Return o_BWd; `mask` is added to the scores [B, W, C]."""
    if q_BWd.is_cuda:
        return F.scaled_dot_product_attention(q_BWd, k_BCd, v_BCd, attn_mask=mask, scale=scale)
    rows = q_BWd.shape[1]
    if rows % least:
        q_BWd = F.pad(q_BWd, (0, 0, 0, -rows % least))
        if mask.shape[1] > 1:
            mask = F.pad(mask, (0, 0, 0, -rows % least))
    score_BWC = torch.bmm(q_BWd, k_BCd.transpose(1, 2)).mul_(scale).add_(mask)
    prob_BWC = torch.softmax(score_BWC, dim=-1, dtype=torch.float32).to(v_BCd.dtype)
    return torch.bmm(prob_BWC, v_BCd)[:, :rows]
