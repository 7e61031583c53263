"""Keys and values of sequences in the making.

A prompt's cache is one tensor of its own length. Decoding sequences live in slabs, one per capacity; a sequence is
always in the smallest capacity that holds its own length, and moves when it outgrows it. Attention runs over a
slab's whole capacity, so its rounding depends on a sequence's own length and on nobody else. Slots of a slab are
dense: the last one fills the hole that a leaver makes. This module does not know tokens, adapters or attention.
"""

# Shape suffix legend
#   Y = layers, S = slots, G = key/value heads, C = capacity in positions, L = positions of a prompt, d = head dimension

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_FIRST_CAPACITY = 64


def capacity_for(length: int) -> int:
    """Return the smallest capacity of 64, 128, 192, 256, 384, 512, 768, 1024, ... that holds `length` positions."""
    capacity = _FIRST_CAPACITY
    while capacity < length:
        if capacity & (capacity - 1) == 0:  # a power of two: half as much again, but 64 -> 128
            capacity = capacity * 3 // 2 if capacity > _FIRST_CAPACITY else capacity * 2
        else:
            capacity = capacity // 3 * 4
    return capacity


@dataclass(eq=False)
class PromptCache:
    """Keys [0] and values [1] of one prompt; `length` positions are filled."""

    kv_Y2GLd: Tensor
    length: int = 0


@dataclass(eq=False)
class Slot:
    """Where a decoding sequence's keys and values are; `length` positions are filled."""

    slab: Slab
    index: int
    length: int


class Slab:
    """Slots of one capacity; the first `len(slots)` are in use."""

    def __init__(self, capacity: int, kv_Y2SGCd: Tensor) -> None:
        """Start with all slots free."""
        self.capacity = capacity
        self.kv_Y2SGCd = kv_Y2SGCd
        self.slots: list[Slot] = []

    def take(self, length: int) -> Slot:
        """Return a new slot at the end."""
        if len(self.slots) == self.kv_Y2SGCd.shape[2]:
            self.kv_Y2SGCd = torch.cat([self.kv_Y2SGCd, torch.zeros_like(self.kv_Y2SGCd)], dim=2)
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
    """All caches of one decoder; one thread owns it."""

    def __init__(
        self, num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Hold nothing yet."""
        self._shape = (num_layers, 2, num_kv_heads, head_dim)
        self._dtype, self._device = dtype, device
        self._slabs: dict[int, Slab] = {}

    @property
    def slabs(self) -> list[Slab]:
        """Slabs that have sequences, by rising capacity."""
        return [self._slabs[capacity] for capacity in sorted(self._slabs)]

    @property
    def num_bytes(self) -> int:
        """Memory of the slabs, in bytes."""
        return sum(slab.kv_Y2SGCd.nbytes for slab in self._slabs.values())

    def new_prompt(self, length: int) -> PromptCache:
        """Return an empty cache for a prompt of `length` tokens."""
        layers, two, heads, width = self._shape
        shape = (layers, two, heads, length, width)
        return PromptCache(torch.empty(shape, dtype=self._dtype, device=self._device))

    def fork(self, prompt: PromptCache) -> Slot:
        """Return a new sequence that goes on from a finished prompt, with room for one more position."""
        slot = self._slab(capacity_for(prompt.length + 1)).take(prompt.length)
        slot.slab.kv_Y2SGCd[:, :, slot.index, :, : prompt.length] = prompt.kv_Y2GLd[:, :, :, : prompt.length]
        return slot

    def make_room(self, slot: Slot) -> Slot:
        """Return the slot, or a larger one with the same content, so that one more position fits."""
        if slot.length < slot.slab.capacity:
            return slot
        moved = self._slab(capacity_for(slot.length + 1)).take(slot.length)
        filled = slot.slab.kv_Y2SGCd[:, :, slot.index, :, : slot.length]
        moved.slab.kv_Y2SGCd[:, :, moved.index, :, : slot.length] = filled
        self.release(slot)
        return moved

    def release(self, slot: Slot, *, wipe: bool = False) -> None:
        """Free a slot; `wipe` it if it may hold values that are not finite: masked, they would still spoil a sum."""
        if wipe:
            slot.slab.kv_Y2SGCd[:, :, slot.index].zero_()
        slot.slab.drop(slot)
        if not slot.slab.slots:
            del self._slabs[slot.slab.capacity]

    def _slab(self, capacity: int) -> Slab:
        if capacity not in self._slabs:
            layers, two, heads, width = self._shape
            # Zeros, not garbage: what is masked must at least be finite.
            kv_Y2SGCd = torch.zeros(layers, two, 4, heads, capacity, width, dtype=self._dtype, device=self._device)
            self._slabs[capacity] = Slab(capacity, kv_Y2SGCd)
        return self._slabs[capacity]
