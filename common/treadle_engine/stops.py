"""Decides when a sample ends: stop tokens, end-of-sequence tokens, stop strings across token borders, its limit.

Stop strings are searched in the text of the newest tokens only, so the cost per token does not grow with the
sample. This module does not know models, or how tokens were drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from transformers import AutoTokenizer

from treadle_engine.errors import EngineError
from treadle_engine.sampling_params import SamplingParams

StopReason = Literal["stop", "length"]
Detokenize = Callable[[Sequence[int]], str]
"""Text of some tokens, special tokens included; an incomplete character becomes U+FFFD."""

# Tokens beyond a stop string's length in bytes that are looked at: some tokens have no text at all.
_MARGIN = 8


def load_fast_tokenizer(path_or_name: str) -> Any:  # transformers' type, of which there are several
    """Return a base's tokenizer; UNKNOWN_BASE if it has no fast one."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path_or_name)
    except (OSError, ValueError, KeyError) as error:
        raise EngineError("UNKNOWN_BASE", f"cannot load the tokenizer of {path_or_name!r}: {error}") from error
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise EngineError("UNKNOWN_BASE", f"the tokenizer of {path_or_name!r} is not a fast one")
    return tokenizer


def load_detokenizer(path_or_name: str) -> Detokenize:
    """Return the text function of a base's tokenizer; UNKNOWN_BASE if it has no fast one."""
    backend = load_fast_tokenizer(path_or_name).backend_tokenizer

    def detokenize(tokens: Sequence[int]) -> str:
        text: str = backend.decode(list(tokens), skip_special_tokens=False)
        return text

    return detokenize


class StopRule:
    """The stop conditions of one request, asked after every token of its samples."""

    def __init__(
        self, params: SamplingParams, limit: int, eos_tokens: Sequence[int], detokenize: Detokenize | None
    ) -> None:
        """Collect the conditions; BAD_SAMPLING_PARAMS if stop strings are asked for and there is no tokenizer."""
        if params.stop_strings and detokenize is None:
            raise EngineError("BAD_SAMPLING_PARAMS", "this base has no tokenizer, so stop strings cannot be found")
        self._detokenize = detokenize
        self._limit = limit
        self._tokens = frozenset(params.stop_tokens) | frozenset(() if params.ignore_eos else eos_tokens)
        self._strings = params.stop_strings
        # A token is at least one byte of text, so the match that the newest token completes lies in this window.
        self._window = _MARGIN + max((len(stop.encode()) for stop in self._strings), default=0)

    def check(self, tokens: Sequence[int]) -> StopReason | None:
        """Return why a sample with these tokens ends, None if it goes on."""
        if tokens[-1] in self._tokens:
            return "stop"
        if self._strings and self._detokenize is not None:
            text = self._detokenize(tokens[-self._window :])
            if any(stop in text for stop in self._strings):
                return "stop"
        return "length" if len(tokens) >= self._limit else None
