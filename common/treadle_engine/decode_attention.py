"""Attention of one step: parts of texts that are read, and sequences that add one token.

Both go the same way, so that a token's numbers do not tell whether it was read, drawn, kept from an earlier request or
read again: by kernels where the CPU has the instructions for them (`kernel_attention.py`), else by the same products
over the capacity that a row's own position asks for. On a CPU these are written out, since torch's fused kernels round
by the shape of the query; on CUDA the fused kernel does the work. This module does not know tokens or adapters.
"""

# Shape suffix legend
#   T = rows of the step, U = rows of a part within one capacity, S = sequences of one slab, B = products of a batch
#   H = query heads, G = key/value heads, J = query heads per key/value head, C = capacity, d = head dimension
#   W = rows of one product: J or U * J, filled up to `block_rows`

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from treadle_engine.attention import PackedCausal
from treadle_engine.kernel_attention import KernelAttention, serves
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
        padding = -count * heads % least
        q_GWd, mask_1WC = (F.pad(x, (0, 0, 0, padding)) for x in (q_GUJd.reshape(groups, -1, width), mask_1WC))
        o_GWd = _attend(q_GWd, k_GCd.transpose(1, 2), v_GCd, mask_1WC, scale)[:, : count * heads]
        o_THd[self._rows] = o_GWd.reshape(groups, count, heads, width).transpose(0, 1).reshape(count, -1, width)


class _SlabRows:
    """Neighbouring sequences of one slab in this step, and where their products are among all of the step's."""

    def __init__(self, slab: Slab, slots: Sequence[Slot], groups: int, first: int, device: torch.device) -> None:
        """Take the step's products from number `first` on: one per slot and key/value head."""
        self.slots = slots
        self.products = slice(first, first + len(slots) * groups)
        self._slab = slab
        self._layers = slab.products(slots[0].index, len(slots))
        places_B = torch.tensor([slot.length for slot in slots], device=device).repeat_interleave(groups)
        starts_B = torch.arange(len(places_B), device=device) + slots[0].index * groups
        lines_B = starts_B * slab.capacity + places_B
        # Where the rows' keys, then their values, go in a layer of the slab seen as lines of one head each.
        self._lines = torch.cat((lines_B, lines_B + slab.num_slots * slab.capacity * groups))
        self._masks = _Masks(places_B, slab.capacity)

    def attend(
        self, layer: int, q_BWd: Tensor, kv_2Bd: Tensor, o_BWd: Tensor, scale: float, window: int | None
    ) -> None:
        """Append the rows' keys and values, and fill o_BWd."""
        self._slab.lines(layer).index_copy_(0, self._lines, kv_2Bd)
        k_BdC, v_BCd = self._layers[layer]
        _attend(q_BWd, k_BdC, v_BCd, self._masks.of(window, q_BWd.dtype), scale, out=o_BWd)


class _Decoding:
    """All sequences of a step that add one token; their products lie slab by slab.

    A product's queries are the query heads that share a key/value head, so that no key is copied; the last of them
    also fills it up to `least` rows.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        slabs: Sequence[Slab],
        first: int,
        heads: tuple[int, int],
        least: int,
        device: torch.device,
    ) -> None:
        """Plan for `slots`, whose rows begin at `first`; `heads` are those of queries and those of keys."""
        row_of = {id(slot): first + index for index, slot in enumerate(slots)}
        num_heads, groups = heads
        self._slabs: list[_SlabRows] = []
        for slab in slabs:
            for takes_part, run in itertools.groupby(slab.slots, lambda slot: id(slot) in row_of):
                if takes_part:
                    begin = self._slabs[-1].products.stop if self._slabs else 0
                    self._slabs.append(_SlabRows(slab, list(run), groups, begin, device))
        self._rows = slice(first, first + len(slots))
        order_S = [np.array([row_of[id(slot)] for slot in slab.slots]) for slab in self._slabs]
        rows_S = np.concatenate(order_S)
        shared = num_heads // groups
        self._width = -(-shared // least) * least
        heads_GW = np.arange(groups)[:, None] * shared + np.minimum(np.arange(self._width), shared - 1)
        self._queries = torch.from_numpy((rows_S[:, None, None] * num_heads + heads_GW).ravel()).to(device)
        heads_H = np.arange(num_heads)
        lines_H = heads_H // shared * self._width + heads_H % shared
        places_S = np.argsort(rows_S)
        self._outputs = torch.from_numpy((places_S[:, None] * (groups * self._width) + lines_H).ravel()).to(device)
        # Of all rows' keys, and behind them values, those that each slab appends: keys first.
        lines = [(rows[:, None] * groups + np.arange(groups)).ravel() for rows in order_S]
        both = [own + offset for own in lines for offset in (0, self._rows.stop * groups)]
        self._appended = torch.from_numpy(np.concatenate(both)).to(device)

    def attend(
        self, layer: int, qkv: tuple[Tensor, Tensor, Tensor], o_THd: Tensor, scale: float, window: int | None
    ) -> None:
        """Append the rows' keys and values, and fill their rows of o_THd."""
        q_THd, k_TGd, v_TGd = qkv
        width = q_THd.shape[2]
        q_BWd = q_THd.reshape(-1, width).index_select(0, self._queries).view(-1, self._width, width)
        kv_2Bd = torch.cat((k_TGd, v_TGd)).view(-1, width).index_select(0, self._appended)
        o_BWd = torch.empty_like(q_BWd)
        for slab in self._slabs:
            cut, both = slab.products, slice(2 * slab.products.start, 2 * slab.products.stop)
            slab.attend(layer, q_BWd[cut], kv_2Bd[both], o_BWd[cut], scale, window)
        torch.index_select(o_BWd.view(-1, width), 0, self._outputs, out=o_THd[self._rows].view(-1, width))


class DecodeAttention:
    """The `AttentionPlan` of one step over parts of texts and single tokens, in this order of rows."""

    def __init__(
        self,
        parts: Sequence[TextPart],
        slots: Sequence[Slot],
        slabs: Sequence[Slab],
        heads: tuple[int, int],
        block_rows: int,
        device: torch.device,
    ) -> None:
        """Plan; `slots` are in row order and live in `slabs`, `heads` are those of queries and those of keys."""
        self._least = block_rows if device.type == "cpu" else 1
        self._packed: list[tuple[TextPart, int, PackedCausal]] = []
        self._others: list[tuple[TextPart, int]] = []
        row = 0
        for part in parts:
            if part.packed:
                self._packed.append((part, row, PackedCausal([part.count], device)))
            else:
                self._others.append((part, row))
            row += part.count
        self._kernel: KernelAttention | None = None
        self._part_rows: list[_PartRows] = []
        self._decoding: _Decoding | None = None
        kv = self._others[0][0].cache.kv_Y2GCd if self._others else slots[0].slab.kv_Y2SGCd if slots else None
        if kv is not None and serves(kv):
            self._kernel = KernelAttention(
                [(part.cache, start, part.count) for part, start in self._others], slots, row
            )
            return
        for part, start in self._others:
            self._part_rows += _part_rows(part, start, device)
        self._decoding = _Decoding(slots, slabs, row, heads, self._least, device) if slots else None

    def attend(
        self, layer: int, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """Fill the caches of this layer and return o_THd."""
        o_THd = torch.empty_like(q_THd, memory_format=torch.contiguous_format)
        for part, start, packed in self._packed:
            _fill(part, start, layer, k_TGd, v_TGd)
            cut = slice(start, start + part.count)
            o_THd[cut] = packed.attend(layer, q_THd[cut], k_TGd[cut], v_TGd[cut], scale, window)
        if self._kernel is not None:
            self._kernel.attend(layer, q_THd, k_TGd, v_TGd, o_THd, scale, window)
            return o_THd
        for part, start in self._others:
            _fill(part, start, layer, k_TGd, v_TGd)
        for rows in self._part_rows:
            rows.attend(layer, q_THd, o_THd, scale, window, self._least)
        if self._decoding is not None:
            self._decoding.attend(layer, (q_THd, k_TGd, v_TGd), o_THd, scale, window)
        return o_THd


def _part_rows(part: TextPart, row: int, device: torch.device) -> Iterator[_PartRows]:
    """Yield the rows of a part, which begins at `row`, by the capacity that they attend over."""
    place, end = part.cache.length, part.cache.length + part.count
    while place < end:
        stop = min(end, capacity_for(place + 1))
        yield _PartRows(part, place, stop, row, device)
        row += stop - place
        place = stop


def _fill(part: TextPart, start: int, layer: int, k_TGd: Tensor, v_TGd: Tensor) -> None:
    """Append the keys and values of a part, which begins at row `start`, to its cache."""
    rows, places = slice(start, start + part.count), slice(part.cache.length, part.cache.length + part.count)
    part.cache.kv_Y2GCd[layer, 0, :, places] = k_TGd[rows].transpose(0, 1)
    part.cache.kv_Y2GCd[layer, 1, :, places] = v_TGd[rows].transpose(0, 1)


def _attend(
    q_BWd: Tensor, k_BdC: Tensor, v_BCd: Tensor, mask: Tensor, scale: float, out: Tensor | None = None
) -> Tensor:
    """Return o_BWd, in `out` if that is given; `mask` is added to the scores [B, W, C]."""
    if q_BWd.is_cuda:
        o_BWd = F.scaled_dot_product_attention(q_BWd, k_BdC.transpose(1, 2), v_BCd, attn_mask=mask, scale=scale)
        return o_BWd if out is None else out.copy_(o_BWd)
    score_BWC = torch.bmm(q_BWd, k_BdC).mul_(scale).add_(mask)
    # Computed in float32 and rounded once.
    prob_BWC = torch.softmax(score_BWC, dim=-1)
    return torch.bmm(prob_BWC, v_BCd) if out is None else torch.bmm(prob_BWC, v_BCd, out=out)
