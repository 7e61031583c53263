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

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from treadle_engine.prefix_cache import BLOCK, PrefixCache

_FINE = 512
_LINE_BYTES = 64
# Positions of the smallest buffer that a slab is given while the budget has room.
_LEAST_POSITIONS = 512
# Runs of neighbouring slots whose views a slab keeps: with several owners, steps may go by turns.
_KEPT_VIEWS = 8
# Of the budget, what `prepare` may take.
_PREPARED_SHARE = 8


def capacity_for(length: int) -> int:
    """Return the smallest capacity that holds `length` positions: multiples of 64 to 512, then quarters of a doubling.

    Whoever reads position p attends over `capacity_for(p + 1)` positions, decoding or not: the shape of that product
    follows from p alone.
    """
    step, top = BLOCK, _FINE
    while top < length:
        step, top = top // 4, top * 2
    return max(1, -(-length // step)) * step


def _zeros(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros; on a CPU they take memory, and time, only where they are used."""
    if device.type != "cpu":
        return torch.zeros(size, dtype=dtype, device=device)
    # The system's own zero pages; torch would write into all of them at once. On a cache line, as torch begins.
    values = torch.from_numpy(np.zeros(size * dtype.itemsize + _LINE_BYTES, np.uint8))
    start = -values.data_ptr() % _LINE_BYTES
    return values[start : start + size * dtype.itemsize].view(dtype)


@dataclass(eq=False)
class TextCache:
    """Keys [0] and values [1] of a text that is read; `length` positions are filled, the others are finite."""

    buffer: Tensor
    kv_Y2GCd: Tensor
    """The beginning of the buffer."""
    length: int = 0


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
    """Slots of one capacity in one buffer; the first `len(slots)` are in use."""

    kv_Y2SGCd: Tensor
    """The buffer by slots; there is none before the first `move`."""

    def __init__(self, capacity: int, shape: tuple[int, int, int, int]) -> None:
        """Have no slots; `shape` is (layers, 2, key/value heads, head dimension)."""
        self.capacity = capacity
        self.slots: list[Slot] = []
        self.buffer: Tensor | None = None
        self._shape = shape
        self._lines: list[Tensor] = []
        self._products: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}

    @property
    def num_slots(self) -> int:
        """Slots that it has memory for."""
        return 0 if self.buffer is None else self._slots_in(self.buffer)

    @property
    def num_positions(self) -> int:
        """Positions that it has memory for; a few at the end may be of no use to it."""
        return 0 if self.buffer is None else self.buffer.numel() // math.prod(self._shape)

    @property
    def is_full(self) -> bool:
        """Tell whether the next slot needs more memory."""
        return len(self.slots) == self.num_slots

    def lines(self, layer: int) -> Tensor:
        """Return a layer seen as [2 * S * G * C, d], all slots' keys before all slots' values."""
        if not self._lines:
            self._lines = [kv_2SGCd.view(-1, kv_2SGCd.shape[-1]) for kv_2SGCd in self.kv_Y2SGCd]
        return self._lines[layer]

    def products(self, first: int, count: int) -> list[tuple[Tensor, Tensor]]:
        """Return each layer's (k_BdC, v_BCd) of `count` slots from `first` on, B = count * G; made once and kept."""
        key = (first, count)
        if key not in self._products:
            if len(self._products) >= _KEPT_VIEWS:
                self._products.clear()
            chosen_Y2BCd = self.kv_Y2SGCd[:, :, first : first + count].flatten(2, 3)
            self._products[key] = [(k_BCd.transpose(1, 2), v_BCd) for k_BCd, v_BCd in chosen_Y2BCd]
        return self._products[key]

    def move(self, buffer: Tensor) -> None:
        """Go on in another buffer, which holds no fewer slots than are in use."""
        layers, two, heads, width = self._shape
        slots, used = self._slots_in(buffer), len(self.slots)
        values = buffer[: slots * self.capacity * math.prod(self._shape)]
        moved_Y2SGCd = values.view(layers, two, slots, heads, self.capacity, width)
        if used:
            moved_Y2SGCd[:, :, :used] = self.kv_Y2SGCd[:, :, :used]
        self.buffer, self.kv_Y2SGCd = buffer, moved_Y2SGCd
        self._lines.clear()
        self._products.clear()

    def _slots_in(self, buffer: Tensor) -> int:
        return buffer.numel() // (math.prod(self._shape) * self.capacity)

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
    """All keys and values of one decoder; one thread owns it.

    Buffers that slabs and texts have left are kept for the next while the budget has room for them: to get memory from
    the operating system takes longer than to fill it. What they hold is finite: masked, anything else would still
    spoil a sum.
    """

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
        self._values = math.prod(self._shape)
        self._dtype, self._device = dtype, device
        self._slabs: dict[int, Slab] = {}
        self._idle: list[Tensor] = []
        self._text_positions = 0

    @property
    def slabs(self) -> list[Slab]:
        """Slabs that have sequences, by rising capacity."""
        return [self._slabs[capacity] for capacity in sorted(self._slabs)]

    @property
    def num_positions(self) -> int:
        """Positions that memory is in use for, kept prefixes included."""
        slabs = sum(slab.num_positions for slab in self._slabs.values())
        return slabs + self._text_positions + self.prefixes.num_positions

    @property
    def num_bytes(self) -> int:
        """Memory held, idle buffers included, in bytes."""
        return (self.num_positions + self._num_idle) * self._values * self._dtype.itemsize

    def prepare(self) -> None:
        """Have memory ready in usual sizes, an eighth of the budget at most: the first to need it would wait for it."""
        positions = _LEAST_POSITIONS
        while self.num_positions + self._num_idle + positions <= self.max_positions // _PREPARED_SHARE:
            buffer = torch.empty(positions * self._values, dtype=self._dtype, device=self._device)
            self._idle.append(buffer.zero_())
            positions *= 2

    def forget(self) -> None:
        """Give back what is kept for others: prefixes and idle buffers."""
        self.prefixes.clear()
        self._idle.clear()

    def make_room(self, positions: int) -> bool:
        """Free so many positions, False if they never are.

        Buffers that nobody uses go first, then what slabs have to spare, then the prefixes that were used least lately.
        """
        if self.num_positions - self.prefixes.num_positions + positions > self.max_positions:
            for slab in self._slabs.values():
                if not slab.is_full:
                    self._move(slab, len(slab.slots) * slab.capacity)
        if self.num_positions - self.prefixes.num_positions + positions > self.max_positions:
            return False
        while self.num_positions + positions > self.max_positions:
            self.prefixes.drop_oldest()
        self._drop_idle(positions)
        return True

    def slot_cost(self, length: int) -> int:
        """Return the positions that a sequence of `length` would add."""
        slab = self._slabs.get(capacity_for(length))
        return capacity_for(length) if slab is None or slab.is_full else 0

    def new_text(self, length: int, promised: int = 0) -> TextCache:
        """Return an empty cache for a text of `length` tokens; there is room for it.

        Of what is free beyond it, `promised` positions are not for making it a size that does for others later.
        """
        layers, two, heads, width = self._shape
        capacity = capacity_for(length)
        usual = 1 << (capacity - 1).bit_length()
        spare = self.max_positions - self.num_positions - promised
        buffer = self._get(usual if usual <= spare else capacity)
        self._text_positions += buffer.numel() // self._values
        filled = buffer[: capacity * self._values]
        return TextCache(buffer, filled.view(layers, two, heads, capacity, width))

    def free_text(self, text: TextCache) -> None:
        """Give a text's cache back."""
        # Whether its numbers were finite need not have been noticed: a text may only have been scored.
        text.kv_Y2GCd.zero_()
        self._text_positions -= text.buffer.numel() // self._values
        self._keep(text.buffer)

    def fork(self, text: TextCache, promised: int = 0) -> Slot:
        """Return a new sequence that goes on from a text, with room for one more position; there is room for it.

        Of what is free beyond it, `promised` positions are not for the slab's spare slots.
        """
        slot = self._take(text.length, promised, 1)
        slot.slab.kv_Y2SGCd[:, :, slot.index, :, : text.length] = text.kv_Y2GCd[:, :, :, : text.length]
        return slot

    def grow(self, slot: Slot, promised: int = 0) -> Slot:
        """Return a larger slot with the same content, so that one more position fits; there is room for it."""
        # Who began with it will follow it.
        moved = self._take(slot.length, promised, len(slot.slab.slots))
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
            if slab.buffer is not None:
                self._keep(slab.buffer)

    def _take(self, length: int, promised: int, expected: int) -> Slot:
        """Return a slot; that many may be wanted soon."""
        capacity = capacity_for(length + 1)
        slab = self._slabs.get(capacity)
        if slab is None:
            slab = self._slabs[capacity] = Slab(capacity, self._shape)
        if slab.is_full:
            # Twice as much where the budget allows it, so that a slab is not copied for every newcomer; in sizes
            # that do for a slab of any other capacity later.
            used, spare = len(slab.slots), self.max_positions - self.num_positions - promised
            wanted = max(_LEAST_POSITIONS, 1 << ((used + max(used, expected)) * capacity - 1).bit_length())
            if wanted - slab.num_positions > spare:
                wanted = (used + max(1, min(max(4, used), spare // capacity))) * capacity
            self._move(slab, wanted)
        return slab.take(length)

    def _move(self, slab: Slab, positions: int) -> None:
        """Let a slab go on in a buffer of so many positions."""
        left = slab.buffer
        slab.move(self._get(positions, slab.num_positions))
        if left is not None:
            self._keep(left)

    def _get(self, positions: int, left: int = 0) -> Tensor:
        """Return a buffer of so many positions, `left` of which the budget has counted already."""
        size = positions * self._values
        for place, buffer in enumerate(self._idle):
            if buffer.numel() == size:
                return self._idle.pop(place)
        self._drop_idle(positions - left)
        return _zeros(size, self._dtype, self._device)

    def _keep(self, buffer: Tensor) -> None:
        """Keep a buffer that nobody uses any more if the budget has room for it."""
        self._idle.append(buffer)
        self._drop_idle(0)

    @property
    def _num_idle(self) -> int:
        return sum(buffer.numel() for buffer in self._idle) // self._values

    def _drop_idle(self, positions: int) -> None:
        """Give idle buffers back, the oldest first, until so many more positions are within the budget."""
        while self._idle and self.num_positions + self._num_idle + positions > self.max_positions:
            self._idle.pop(0)
