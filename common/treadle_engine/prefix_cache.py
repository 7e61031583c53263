"""Keys and values of whole blocks of text, kept for the next request that begins alike.

A block's key is a chain of hashes over the adapter and all tokens up to the block's end, so equal keys mean equal
numbers. Least recently used blocks go first. This module does not know where blocks come from or what they cost.
"""

# Shape suffix legend
#   T = tokens, Y = layers, G = key/value heads, L = BLOCK positions, d = head dimension

from __future__ import annotations

import hashlib
from collections import OrderedDict

import numpy as np
import numpy.typing as npt
from torch import Tensor

BLOCK = 64
"""Positions of a block."""


class BlockKeys:
    """The keys of a growing text's whole blocks."""

    def __init__(self, seed: bytes) -> None:
        """Start with an empty text; `seed` stands for the adapter."""
        self._last = seed
        self._rest: list[int] = []
        self.keys: list[bytes] = []

    def extend(self, tokens_T: npt.NDArray[np.int32]) -> None:
        """Append tokens."""
        tokens_T = np.concatenate([np.array(self._rest, dtype=np.int32), tokens_T])
        whole = len(tokens_T) // BLOCK * BLOCK
        for start in range(0, whole, BLOCK):
            block = np.ascontiguousarray(tokens_T[start : start + BLOCK], dtype="<i4")
            self._last = hashlib.blake2b(self._last + block.tobytes(), digest_size=16).digest()
            self.keys.append(self._last)
        self._rest = tokens_T[whole:].tolist()

    def grown(self, tokens_T: npt.NDArray[np.int32]) -> BlockKeys:
        """Return the keys of a longer text; this one's stay as they are."""
        longer = BlockKeys(self._last)
        longer._rest, longer.keys = self._rest, list(self.keys)
        longer.extend(tokens_T)
        return longer


class PrefixCache:
    """Blocks by key, least recently used first."""

    def __init__(self) -> None:
        """Hold nothing yet."""
        self._blocks: OrderedDict[bytes, Tensor] = OrderedDict()

    @property
    def num_positions(self) -> int:
        """Positions of all blocks."""
        return BLOCK * len(self._blocks)

    def __contains__(self, key: bytes) -> bool:
        return key in self._blocks

    def get(self, key: bytes) -> Tensor | None:
        """Return a block's keys and values [Y, 2, G, L, d], and count it as used."""
        block = self._blocks.get(key)
        if block is not None:
            self._blocks.move_to_end(key)
        return block

    def put(self, key: bytes, kv_Y2GLd: Tensor) -> None:
        """Keep a copy of a block."""
        self._blocks[key] = kv_Y2GLd.clone()

    def drop_oldest(self) -> None:
        """Forget the block that was not used for longest; there is one."""
        self._blocks.popitem(last=False)

    def clear(self) -> None:
        """Forget all blocks."""
        self._blocks.clear()
