"""Segments of a stream whose LoRA products a few calls compute together, and what they have in common at all linears.

Which products, and in which dtype, the kinds of them say. Knows segments and addresses, no linears.
"""

# Shape suffix legend
#   M = rows of the stream, I = in features, O = out features

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from treadle_engine.lora_products import Block

if TYPE_CHECKING:
    from treadle_engine.lora import Segment


class GroupedLows(ABC):
    """A x^T of grouped segments at one group of linears."""

    def __init__(self, owner: GroupedSegments, count: int) -> None:
        """Hold those of `owner` at `count` sites."""
        self.owner, self.count = owner, count

    def select(self, segments: Sequence[Segment], kept: Sequence[Tensor]) -> Self | None:
        """Return those of `kept` rows, given for every segment of the stream; `segments` are those that remain."""
        places = [place for place, index in enumerate(self.owner.indices) if kept[index].numel()]
        if not places:
            return None
        indices = [self.owner.indices[place] for place in places]
        chosen = type(self)(type(self.owner)(indices, [segments[index] for index in indices]), self.count)
        for to, (place, index) in enumerate(zip(places, indices, strict=True)):
            self._copy_rows(place, kept[index], chosen, to)
        return chosen

    @abstractmethod
    def _copy_rows(self, place: int, rows_N: Tensor, chosen: Self, to: int) -> None:
        """Make rows of segment `place` all that segment `to` of `chosen` has."""


class GroupedSegments(ABC):
    """Some segments of a stream, each of which has rows and weights."""

    dtype: ClassVar[torch.dtype]
    """What products read the weights in."""

    def __init__(self, indices: Sequence[int], own: Sequence[Segment]) -> None:
        """Take segments and their places in the stream."""
        self.indices = list(indices)
        self.places = frozenset(indices)
        # Not all of the stream's: who keeps those keeps this, and a circle would live on beyond its pass.
        self._own = list(own)
        self._adapters = [weights for segment in self._own if (weights := segment.weights) is not None]
        self.rows = np.array([segment.stop - segment.start for segment in self._own], np.int32)
        self.ranks = np.array([weights.config.rank for weights in self._adapters], np.int32)
        self._scales = np.array([weights.scale for weights in self._adapters], np.float32)
        self._flats = np.array([weights.views(self.dtype).flat.data_ptr() for weights in self._adapters], np.int64)
        self._at_a = stacked_offsets([weights.layout.offsets_a for weights in self._adapters])
        self._at_b = stacked_offsets([weights.layout.offsets_b for weights in self._adapters])
        self._parts: dict[bytes, Self | None] = {}

    def at(self, site: int) -> Self | None:
        """Return those that have weights at a site, None if there are none."""
        if site >= self._at_a.shape[1]:
            return None
        present = self._at_a[:, site] >= 0
        if present.all():
            return self
        key = present.tobytes()
        if key not in self._parts:
            some = present.nonzero()[0].tolist()
            own = [self._own[place] for place in some]
            self._parts[key] = type(self)([self.indices[place] for place in some], own) if some else None
        return self._parts[key]

    @abstractmethod
    def forward(self, first: int, x_MI: Tensor, ys: Sequence[Tensor]) -> GroupedLows:
        """Add scale * B A x to each y_MO, at neighbouring sites from `first` on; all segments have weights there."""

    @abstractmethod
    def backward(
        self, first: int, gradients: Sequence[Tensor], x_MI: Tensor, lows: GroupedLows, g_MI: Tensor | None
    ) -> Sequence[Block | None]:
        """Add scale * g A to `g_MI` unless it is None, and the gradients of A and B to the segments' `grads`.

        Returns for each segment what is still to be added there, in the order of the stream.
        """


def stacked_offsets(offsets: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Return [segments, sites]; adapters without the last sites have -1 there."""
    width = max(len(row) for row in offsets)
    stack = np.full((len(offsets), width), -1, np.int64)
    for row, own in zip(stack, offsets, strict=True):
        row[: len(own)] = own
    return stack
