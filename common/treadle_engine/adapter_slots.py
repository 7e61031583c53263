"""Adapters in use, stacked so that one batched product serves many of them, whatever company they are in.

Adapters of one padded rank, and of scales that differ by powers of two, share a bank: per group of linears that read
the same input one tensor of A's, per linear one of B's. In a step an adapter's rows are a block of a batched product
when they are few, a product of their own when they are many. From `block_rows` rows up a row's bits do not depend on
which of the two it was.
This module does not know sequences, caches or how a row came to be.
"""

# Shape suffix legend
#   M = rows of the step, N = rows of small segments, P = those rows, padded to blocks, S = adapters of a bank
#   W = rows of one block, R = rank, L = ranks of a group side by side, I = in features, O = out features

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from treadle_engine.lora import AdapterWeights, LoraSite, Segment
from treadle_engine.lora_products import add_product, product_dtype

# From this many columns up, a column of a product does not depend on how many others there are.
_SMALLEST_RANK = 16
# A bank keeps this many adapters that nobody uses at the moment before it gives their slots away.
_KEPT_SLOTS = 8


def group_sites(sites: Sequence[LoraSite]) -> list[tuple[LoraSite, ...]]:
    """Return the sites with those that share their input together."""
    return [tuple(group) for _, group in groupby(sites, key=lambda site: site.group)]


@dataclass(eq=False)
class _Tenancy:
    """Which adapter a slot holds a copy of, and as of which change of it."""

    weights: weakref.ref[AdapterWeights]
    version: int
    last_used: int


class _Bank:
    """Adapters of one padded rank, with B so scaled that `scale` serves all; slot s is row s of every stack."""

    def __init__(
        self,
        groups: Sequence[tuple[LoraSite, ...]],
        rank: int,
        scale: float,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.rank, self.scale = rank, scale
        self._dtype, self._device = dtype, device
        self._groups = groups
        self._slots: list[_Tenancy] = []
        self._a_SLI: dict[int, Tensor] = {}
        self._bt_SRO: dict[int, Tensor] = {}

    def slot_of(self, weights: AdapterWeights, step: int) -> int:
        """Return the adapter's slot; copies it in unless it is there. A slot used in this step is not given away."""
        idle: list[tuple[int, int]] = []
        for index, slot in enumerate(self._slots):
            held = slot.weights()
            if held is weights:
                slot.last_used = step
                if slot.version != weights.flat._version:
                    self._copy(index, weights)
                    slot.version = weights.flat._version
                return index
            if slot.last_used < step:
                idle.append((-1 if held is None else slot.last_used, index))
        tenancy = _Tenancy(weakref.ref(weights), weights.flat._version, step)
        if idle and (min(idle)[0] < 0 or len(self._slots) >= _KEPT_SLOTS):
            free = min(idle)[1]
            self._slots[free] = tenancy
        else:
            free = len(self._slots)
            self._slots.append(tenancy)
        self._copy(free, weights)
        return free

    def a_of(self, group: int) -> Tensor | None:
        """Return a group's stack of A's, None where no adapter has any."""
        return self._a_SLI.get(group)

    def bt_of(self, site: int) -> Tensor:
        """Return the stack of transposed B's of a site whose group has A's."""
        return self._bt_SRO[site]

    def _copy(self, slot: int, weights: AdapterWeights) -> None:
        factor = weights.scale / self.scale  # a power of two: B keeps its bits
        for number, group in enumerate(self._groups):
            blocks = [weights.views(self._dtype).block(site.index, 1) for site in group]
            present = [block for block in blocks if block is not None]
            if not present and number not in self._a_SLI:
                continue
            a_LI = self._row(self._a_SLI, number, slot, (self.rank * len(group), group[0].in_features))
            for place, (site, block) in enumerate(zip(group, blocks, strict=True)):
                bt_RO = self._row(self._bt_SRO, site.index, slot, (self.rank, site.out_features))
                if block is not None:
                    a_LI[place * self.rank : place * self.rank + block.a_SI.shape[0]] = block.a_SI
                    torch.mul(block.bt_ROs[0], factor, out=bt_RO[: block.a_SI.shape[0]])

    def _row(self, stacks: dict[int, Tensor], key: int, slot: int, shape: tuple[int, int]) -> Tensor:
        """Return row `slot` of a stack, zeroed; the stack grows by half when it has no such row."""
        stack = stacks.get(key)
        if stack is None or stack.shape[0] <= slot:
            rows = max(4, slot + 1 + slot // 2)
            grown = torch.zeros(rows, *shape, dtype=self._dtype, device=self._device)
            if stack is not None:
                grown[: stack.shape[0]] = stack
            stacks[key] = stack = grown
        return stack[slot].zero_()


@dataclass(eq=False)
class _BankRows:
    """The rows of one bank in a step: `large` are (slot, start, stop), the few rows of a slot are its `small` ones."""

    bank: _Bank
    large: list[tuple[int, int, int]] = field(default_factory=list)
    small: dict[int, list[int]] = field(default_factory=dict)
    first_slot: int = 0
    num_slots: int = 0
    width: int = 0
    start: int | None = None
    rows_P: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    rows_N: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    places_N: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    def lay_out(self, block_rows: int, device: torch.device) -> None:
        """Give every slot between the lowest and the highest in use a block as wide as the one with most rows."""
        if not self.small:
            return
        self.first_slot = min(self.small)
        self.num_slots = 1 + max(self.small) - self.first_slot
        self.width = -(-max(map(len, self.small.values())) // block_rows) * block_rows
        # Places without a row of their own compute on some row of the step, and nobody reads what comes of it.
        padded = [self.small[self.first_slot][0]] * (self.num_slots * self.width)
        rows: list[int] = []
        places: list[int] = []
        for slot, own in self.small.items():
            first = (slot - self.first_slot) * self.width
            padded[first : first + len(own)] = own
            rows += own
            places += range(first, first + len(own))
        if padded == list(range(padded[0], padded[0] + len(padded))):
            self.start = padded[0]
        self.rows_P = torch.tensor(padded, dtype=torch.int64, device=device)
        self.rows_N = torch.tensor(rows, dtype=torch.int64, device=device)
        self.places_N = torch.tensor(places, dtype=torch.int64, device=device)

    def gather(self, x_MI: Tensor) -> Tensor:
        """Return the blocks [S, W, I]: a view where the rows lie that way already."""
        if self.start is None:
            x_PI = x_MI.index_select(0, self.rows_P)
        else:
            x_PI = x_MI[self.start : self.start + self.num_slots * self.width]
        return x_PI.view(self.num_slots, self.width, -1)

    def scatter(self, y_SWO: Tensor, y_MO: Tensor) -> None:
        """Write blocks that were gathered from y_MO back."""
        if self.start is None:
            y_MO.index_copy_(0, self.rows_N, y_SWO.view(-1, y_MO.shape[1]).index_select(0, self.places_N))


class StepAdapters(list[Segment]):
    """The segments of one step, with slots and blocks worked out once for all linears."""

    def __init__(self, segments: Sequence[Segment], slots: AdapterSlots) -> None:
        """Copy adapters that are not in the banks yet."""
        super().__init__(segments)
        self._slots = slots
        self._banks = slots.assign(segments)

    def add_to(self, sites: Sequence[int], x_MI: Tensor, ys: Sequence[Tensor]) -> None:
        """Add scale * B A x of every segment's adapter to each y_MO, at neighbouring sites that share their input."""
        group, place = self._slots.place_of(sites[0])
        x_MI = x_MI.to(self._slots.dtype)
        for rows in self._banks:
            a_SLI = rows.bank.a_of(group)
            if a_SLI is None:
                continue
            rank = rows.bank.rank
            a_SLI = a_SLI[:, place * rank : (place + len(sites)) * rank]
            for slot, start, stop in rows.large:
                low_NL = F.linear(x_MI[start:stop], a_SLI[slot])
                for number, (site, y_MO) in enumerate(zip(sites, ys, strict=True)):
                    bt_RO = rows.bank.bt_of(site)[slot]
                    low_NR = low_NL[:, number * rank : (number + 1) * rank]
                    add_product(y_MO[start:stop], low_NR, bt_RO, rows.bank.scale)
            if not rows.small:
                continue
            slots = slice(rows.first_slot, rows.first_slot + rows.num_slots)
            low_SWL = torch.bmm(rows.gather(x_MI), a_SLI[slots].transpose(1, 2))
            for number, (site, y_MO) in enumerate(zip(sites, ys, strict=True)):
                low_SWR = low_SWL[:, :, number * rank : (number + 1) * rank]
                y_SWO = _plus_products(rows.gather(y_MO), low_SWR, rows.bank.bt_of(site)[slots], rows.bank.scale)
                rows.scatter(y_SWO, y_MO)


def _plus_products(y_SWO: Tensor, low_SWR: Tensor, bt_SRO: Tensor, scale: float) -> Tensor:
    """Add what `add_product` adds to a segment of its own, rounding as it does; in place."""
    if y_SWO.dtype == low_SWR.dtype:
        # The base's part goes into the product: added later, it would round differently.
        return y_SWO.baddbmm_(low_SWR, bt_SRO, alpha=scale)
    return y_SWO.add_(low_SWR.bmm(bt_SRO), alpha=scale)


class AdapterSlots:
    """All banks of one base; owned by the thread that owns the base."""

    def __init__(
        self, sites: Sequence[LoraSite], dtype: torch.dtype, device: torch.device, block_rows: int, large_rows: int
    ) -> None:
        """Hold nothing yet; segments of `large_rows` rows and more get products of their own.

        `dtype` is that of the base; products are in the one that `product_dtype` gives.
        """
        self._groups = group_sites(sites)
        self._places = {
            site.index: (number, place)
            for number, group in enumerate(self._groups)
            for place, site in enumerate(group)
        }  # fmt: skip
        self.dtype, self._device = product_dtype(dtype, device), device
        self._block_rows, self._large_rows = block_rows, large_rows
        self._banks: dict[tuple[int, float], _Bank] = {}
        self._step = 0

    def place_of(self, site: int) -> tuple[int, int]:
        """Return the number of a site's group and its place in it."""
        return self._places[site]

    def assign(self, segments: Sequence[Segment]) -> list[_BankRows]:
        """Find every segment's slot and lay the small ones out in blocks."""
        self._step += 1
        found: dict[tuple[int, float], _BankRows] = {}
        for segment in segments:
            weights = segment.weights
            if weights is None or not weights.layout.sites:
                continue
            key = (padded_rank(weights.config.rank), math.frexp(weights.scale)[0])
            if key not in self._banks:
                self._banks[key] = _Bank(self._groups, *key, self.dtype, self._device)
            rows = found.setdefault(key, _BankRows(self._banks[key]))
            slot = rows.bank.slot_of(weights, self._step)
            if segment.stop - segment.start >= self._large_rows:
                rows.large.append((slot, segment.start, segment.stop))
            else:
                rows.small.setdefault(slot, []).extend(range(segment.start, segment.stop))
        for rows in found.values():
            rows.lay_out(self._block_rows, self._device)
        return list(found.values())


def padded_rank(rank: int) -> int:
    """Return the rank that an adapter's A and B are filled up to with zeros: 8, 16, 32, ..."""
    padded = _SMALLEST_RANK
    while padded < rank:
        padded *= 2
    return padded
