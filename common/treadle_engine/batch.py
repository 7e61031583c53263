"""One operation's training data as numpy columns, and its validation.

A batch holds R sequences one after the other. It knows what a loss needs, but computes nothing; no torch here.
"""

# Shape suffix legend
#   R = sequences, T = packed tokens, K = targets per position (absent when there is one)

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from treadle_engine.errors import EngineError

IGNORE = -1
"""Target of a position that has none."""

COLUMNS = ("weights", "logprobs", "advantages", "clip_low_threshold", "clip_high_threshold", "sequence_ratio_mask")

_POLICY = ("logprobs", "advantages")
REQUIRED: Mapping[str, tuple[str, ...]] = {
    "cross_entropy": ("weights",),
    "importance_sampling": _POLICY,
    "ppo": _POLICY,
    "cispo": _POLICY,
    "dro": _POLICY,
    "gspo": (*_POLICY, "sequence_ratio_mask"),
    "stable_reinforce": _POLICY,
}
"""Loss names and the columns that each cannot do without."""


class BaseLimits(Protocol):
    """What a batch must fit."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens that exist."""
        ...

    @property
    def max_context(self) -> int:
        """Longest sequence, in tokens."""
        ...


@dataclass(frozen=True)
class TokenBatch:
    """lengths_R int64; tokens_T int32; targets int32 [T] or [T, K]; columns float32 of the targets' shape."""

    lengths_R: NDArray[np.int64]
    tokens_T: NDArray[np.int32]
    targets_TK: NDArray[np.int32]
    columns: dict[str, NDArray[np.float32]] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """Tokens in all sequences."""
        return int(self.tokens_T.shape[0])

    @property
    def num_rows(self) -> int:
        """Number of sequences."""
        return int(self.lengths_R.shape[0])

    def positions_T(self) -> NDArray[np.int64]:
        """Return each token's position in its own sequence."""
        ends_R = np.cumsum(self.lengths_R)
        return np.arange(self.num_tokens, dtype=np.int64) - np.repeat(ends_R - self.lengths_R, self.lengths_R)

    def rows(self, start: int, stop: int) -> TokenBatch:
        """Return sequences [start, stop) as a batch of views."""
        first = int(self.lengths_R[:start].sum())
        cut = slice(first, first + int(self.lengths_R[start:stop].sum()))
        columns = {name: column[cut] for name, column in self.columns.items()}
        return TokenBatch(self.lengths_R[start:stop], self.tokens_T[cut], self.targets_TK[cut], columns)

    def validate(self, info: BaseLimits, loss_fn: str, forward_only: bool = False) -> None:
        """Raise EngineError, naming the first datum at fault, unless the base and the loss can take this batch.

        With `forward_only`, cross_entropy needs no weights: they count as zero.
        """
        if loss_fn not in REQUIRED:
            raise EngineError("UNKNOWN_LOSS", f"unknown loss {loss_fn!r}; known: {', '.join(REQUIRED)}")
        self._check_shapes(loss_fn)
        self._check_ranges(info)
        if forward_only and loss_fn == "cross_entropy":
            return
        for name in REQUIRED[loss_fn]:
            if name not in self.columns:
                raise EngineError("MISSING_LOSS_INPUT", f"{loss_fn} needs {name!r} in every datum (datum 0 has none)")

    def _check_shapes(self, loss_fn: str) -> None:
        total = self.num_tokens
        if self.lengths_R.ndim != 1 or self.num_rows == 0 or self.tokens_T.ndim != 1:
            raise EngineError("BAD_SHAPE", "a batch needs at least one datum, and one flat list of tokens")
        empty_R = self.lengths_R < 1
        if empty_R.any():
            raise EngineError("BAD_SHAPE", f"datum {int(empty_R.argmax())} is empty")
        if int(self.lengths_R.sum()) != total:
            raise EngineError(
                "BAD_SHAPE", f"lengths add up to {int(self.lengths_R.sum())}, but there are {total} tokens"
            )
        if self.targets_TK.ndim not in (1, 2) or self.targets_TK.shape[0] != total or 0 in self.targets_TK.shape:
            raise EngineError("BAD_SHAPE", f"targets have shape {list(self.targets_TK.shape)} for {total} tokens")
        if self.targets_TK.ndim == 2 and loss_fn != "cross_entropy":
            raise EngineError("BAD_SHAPE", f"{loss_fn} takes one target per position; only cross_entropy takes several")
        for name, column in self.columns.items():
            if name not in COLUMNS:
                raise EngineError("BAD_VALUE", f"unknown loss input {name!r}; known: {', '.join(COLUMNS)}")
            if column.shape != self.targets_TK.shape:
                raise EngineError(
                    "BAD_SHAPE", f"{name} has shape {list(column.shape)}, targets {list(self.targets_TK.shape)}"
                )

    def _check_ranges(self, info: BaseLimits) -> None:
        long_R = self.lengths_R > info.max_context
        if long_R.any():
            row = int(long_R.argmax())
            length = int(self.lengths_R[row])
            raise EngineError(
                "SEQUENCE_TOO_LONG", f"datum {row} has {length} tokens, the base takes at most {info.max_context}"
            )
        size = info.vocab_size
        self._refuse("TOKEN_OUT_OF_RANGE", "token", (self.tokens_T < 0) | (self.tokens_T >= size), self.tokens_T)
        wrong_TK = (self.targets_TK < IGNORE) | (self.targets_TK >= size)
        self._refuse("TOKEN_OUT_OF_RANGE", "target", wrong_TK, self.targets_TK)
        for name, column in self.columns.items():
            self._refuse("BAD_VALUE", name, ~np.isfinite(column), column)

    def _refuse(self, reason: str, what: str, wrong: NDArray[np.bool_], values: NDArray[np.generic]) -> None:
        if not wrong.any():
            return
        place = np.unravel_index(int(wrong.argmax()), wrong.shape)
        row = int(np.searchsorted(np.cumsum(self.lengths_R), place[0], side="right"))
        offset = int(place[0]) - int(self.lengths_R[:row].sum())
        raise EngineError(reason, f"datum {row}, position {offset}: {what} is {values[place]}")
