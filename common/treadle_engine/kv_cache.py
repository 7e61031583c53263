"""Keys and values of sequences in the making, within a budget of positions.

A text that is being read has a cache of its own. Decoding sequences live in slabs, one per capacity; a sequence is
always in the smallest capacity that holds its own length, and moves when it outgrows it. Attention runs over a whole
capacity, so its rounding depends on a sequence's own length and on nobody else. Slots of a slab are dense: the last
one fills the hole that a leaver makes. Whole blocks of texts are kept for others that begin alike
(`prefix_cache.py`). This module does not know tokens, adapters or attention.
"""

# Shape suffix legend
#   Y = layers, S = slots, G = key/value heads, C = capacity in positions, d = head dimension

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from treadle_engine.prefix_cache import BLOCK, PrefixCache

_FINE = 512


def capacity_for(length: int) -> int:
    """Return the smallest capacity that holds `length` positions: multiples of 64 to 512, then quarters of a doubling.

    Whoever reads position p attends over `capacity_for(p + 1)` positions, decoding or not: the shape of that product
    follows from p alone.
    """
    step, top = BLOCK, _FINE
    while top < length:
        step, top = top // 4, top * 2
    return max(1, -(-length // step)) * step


@dataclass(eq=False)
class TextCache:
    """Keys [0] and values [1] of a text that is read; `length` positions are filled, the others are zero."""

    kv_Y2GCd: Tensor
    length: int = 0

    @property
    def capacity(self) -> int:
        """Positions that it has memory for."""
        return int(self.kv_Y2GCd.shape[3])


@dataclass(eq=False)
class Slot:
    """Where a decoding sequence's keys and values are; `length` positions are filled."""

    slab: Slab
    index: int
    length: int

    def block(self, number: int) -> Tensor:
        """Return a view of the keys and values of a whole block [Y, 2, G, BLOCK, d]."""
        return self.slab.kv_Y2SGCd[:, :, self.index, :, number * BLOCK : (number + 1) * BLOCK]


class Slab:
    """Slots of one capacity; the first `len(slots)` are in use."""

    def __init__(self, capacity: int, kv_Y2SGCd: Tensor) -> None:
        """Start with all slots free."""
        self.capacity = capacity
        self.kv_Y2SGCd = kv_Y2SGCd
        self.slots: list[Slot] = []

    @property
    def num_positions(self) -> int:
        """Positions that it has memory for."""
        return int(self.kv_Y2SGCd.shape[2]) * self.capacity

    @property
    def is_full(self) -> bool:
        """Tell whether the next slot needs more memory."""
        return len(self.slots) == self.kv_Y2SGCd.shape[2]

    def resize(self, num_slots: int) -> None:
        """Make room for `num_slots` slots, no fewer than are in use."""
        shape = list(self.kv_Y2SGCd.shape)
        shape[2] = num_slots
        # Zeros, not garbage: what is masked must at least be finite.
        resized_Y2SGCd = torch.zeros(shape, dtype=self.kv_Y2SGCd.dtype, device=self.kv_Y2SGCd.device)
        resized_Y2SGCd[:, :, : len(self.slots)] = self.kv_Y2SGCd[:, :, : len(self.slots)]
        self.kv_Y2SGCd = resized_Y2SGCd

    def take(self, length: int) -> Slot:
        """Return a new slot at the end; there is one."""
        slot = Slot(self, len(self.slots), length)
        self.slots.append(slot)
        return slot

    def drop(self, slot: Slot) -> None:
        """Free a slot; the last one takes its place."""
        last = self.slots.pop()
        if last is not slot:
            kept = last.length
            self.kv_Y2SGCd[:, :, slot.index, :, :kept] = self.kv_Y2SGCd[:, :, last.index, :, :kept]
            last.index = slot.index
            self.slots[last.index] = last


class KvCache:
    """All keys and values of one decoder; one thread owns it."""

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        max_positions: int,
    ) -> None:
        """Hold nothing yet, and never more than `max_positions` positions."""
        self.max_positions = max_positions
        self.prefixes = PrefixCache()
        self._shape = (num_layers, 2, num_kv_heads, head_dim)
        self._dtype, self._device = dtype, device
        self._slabs: dict[int, Slab] = {}
        self._text_positions = 0

    @property
    def slabs(self) -> list[Slab]:
        """Slabs that have sequences, by rising capacity."""
        return [self._slabs[capacity] for capacity in sorted(self._slabs)]

    @property
    def num_positions(self) -> int:
        """Positions that memory is held for, kept prefixes included."""
        slabs = sum(slab.num_positions for slab in self._slabs.values())
        return slabs + self._text_positions + self.prefixes.num_positions

    @property
    def num_bytes(self) -> int:
        """Memory held, in bytes."""
        layers, two, heads, width = self._shape
        return self.num_positions * layers * two * heads * width * self._dtype.itemsize

    def make_room(self, positions: int) -> bool:
        """Drop kept prefixes, least recently used first, until so many positions are free; False if they never are."""
        if self.num_positions - self.prefixes.num_positions + positions > self.max_positions:
            for slab in self._slabs.values():
                if not slab.is_full:
                    slab.resize(len(slab.slots))
        if self.num_positions - self.prefixes.num_positions + positions > self.max_positions:
            return False
        while self.num_positions + positions > self.max_positions:
            self.prefixes.drop_oldest()
        return True

    def slot_cost(self, length: int) -> int:
        """Return the positions that a sequence of `length` would add."""
        slab = self._slabs.get(capacity_for(length))
        return capacity_for(length) if slab is None or slab.is_full else 0

    def new_text(self, length: int) -> TextCache:
        """Return an empty cache for a text of `length` tokens; there is room for it."""
        layers, two, heads, width = self._shape
        capacity = capacity_for(length)
        self._text_positions += capacity
        shape = (layers, two, heads, capacity, width)
        return TextCache(torch.zeros(shape, dtype=self._dtype, device=self._device))

    def free_text(self, text: TextCache) -> None:
        """Give a text's cache back."""
        self._text_positions -= text.capacity

    def fork(self, text: TextCache, promised: int = 0) -> Slot:
        """Return a new sequence that goes on from a text, with room for one more position; there is room for it.

        Of what is free beyond it, `promised` positions are not for the slab's spare slots.
        """
        slot = self._take(text.length, promised)
        slot.slab.kv_Y2SGCd[:, :, slot.index, :, : text.length] = text.kv_Y2GCd[:, :, :, : text.length]
        return slot

    def grow(self, slot: Slot, promised: int = 0) -> Slot:
        """Return a larger slot with the same content, so that one more position fits; there is room for it."""
        moved = self._take(slot.length, promised)
        filled = slot.slab.kv_Y2SGCd[:, :, slot.index, :, : slot.length]
        moved.slab.kv_Y2SGCd[:, :, moved.index, :, : slot.length] = filled
        self.release(slot)
        return moved

    def release(self, slot: Slot, *, wipe: bool = False) -> None:
        """Free a slot; `wipe` it if it may hold values that are not finite: masked, they would still spoil a sum."""
        slab = slot.slab
        if wipe:
            slab.kv_Y2SGCd[:, :, slot.index].zero_()
        slab.drop(slot)
        if not slab.slots:
            del self._slabs[slab.capacity]
        elif slab.kv_Y2SGCd.shape[2] >= 4 * len(slab.slots):
            slab.resize(2 * len(slab.slots))

    def _take(self, length: int, promised: int) -> Slot:
        capacity = capacity_for(length + 1)
        slab = self._slabs.get(capacity)
        if slab is None:
            layers, two, heads, width = self._shape
            empty_Y2SGCd = torch.zeros(layers, two, 0, heads, capacity, width, dtype=self._dtype, device=self._device)
            slab = self._slabs[capacity] = Slab(capacity, empty_Y2SGCd)
        if slab.is_full:
            # Half as much again where the budget allows it, so that a slab is not copied for every newcomer.
            spare = (self.max_positions - self.num_positions - promised) // capacity
            used = len(slab.slots)
            slab.resize(used + max(1, min(max(3, used // 2), spare)))
        return slab.take(length)
