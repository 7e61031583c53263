"""What a caller may ask of sampling, and the checks that every request passes before it costs anything.

This module does not know models, caches or tokenizers: a base is a vocabulary size and a context length here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from treadle_engine.base_model import BaseInfo
from treadle_engine.errors import EngineError

MAX_SAMPLES = 1024
_MAX_STOPS = 64
_MAX_STOP_CHARACTERS = 1024
_MAX_PENALTY = 10.0
_MAX_BIAS = 100.0
_MAX_BIASES = 1024


@dataclass(frozen=True)
class SamplingParams:
    """How to draw tokens; the defaults draw from the model's own distribution until it stops or the context ends."""

    max_tokens: int | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop_strings: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    @property
    def greedy(self) -> bool:
        """Tell whether the likeliest token is taken, without drawing."""
        return self.temperature == 0.0

    @property
    def filtered(self) -> bool:
        """Tell whether top-k, top-p or min-p cuts the distribution."""
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0

    @property
    def penalised(self) -> bool:
        """Tell whether the distribution depends on which tokens the text has already."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    def check(self, vocab_size: int) -> None:
        """Raise BAD_SAMPLING_PARAMS or TOKEN_OUT_OF_RANGE for a value out of its range."""
        if self.max_tokens is not None and self.max_tokens < 1:
            raise _bad(f"max_tokens must be at least 1, got {self.max_tokens}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0.0):
            raise _bad(f"temperature must be a finite number of at least 0, got {self.temperature}")
        if self.top_k < -1:
            raise _bad(f"top_k must be positive, or 0 or -1 for all tokens, got {self.top_k}")
        if not 0.0 < self.top_p <= 1.0:
            raise _bad(f"top_p must be above 0 and at most 1, got {self.top_p}")
        self._check_penalties()
        if not 0 <= self.seed < 2**64:
            raise _bad(f"seed must be 0..2^64-1, got {self.seed}")
        if len(self.stop_strings) > _MAX_STOPS or len(self.stop_tokens) > _MAX_STOPS:
            raise _bad(f"at most {_MAX_STOPS} stop strings and {_MAX_STOPS} stop tokens are allowed")
        if any(not 0 < len(stop) <= _MAX_STOP_CHARACTERS for stop in self.stop_strings):
            raise _bad(f"a stop string has 1 to {_MAX_STOP_CHARACTERS} characters")
        biased = [token for token, _ in self.logit_bias]
        for what, tokens in (("stop", self.stop_tokens), ("biased", biased)):
            for token in tokens:
                if not 0 <= token < vocab_size:
                    raise EngineError("TOKEN_OUT_OF_RANGE", f"{what} token {token} is not in 0..{vocab_size - 1}")

    def _check_penalties(self) -> None:
        if not 0.0 <= self.min_p <= 1.0:
            raise _bad(f"min_p must be 0..1, got {self.min_p}")
        if not 0.0 < self.repetition_penalty <= _MAX_PENALTY:
            raise _bad(f"repetition_penalty must be above 0 and at most {_MAX_PENALTY}, got {self.repetition_penalty}")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            if not abs(value) <= _MAX_PENALTY:
                raise _bad(f"{name} must be -{_MAX_PENALTY}..{_MAX_PENALTY}, got {value}")
        if len(self.logit_bias) > _MAX_BIASES or len({token for token, _ in self.logit_bias}) < len(self.logit_bias):
            raise _bad(f"logit_bias has at most {_MAX_BIASES} tokens, each once")
        if not all(abs(bias) <= _MAX_BIAS for _, bias in self.logit_bias):
            raise _bad(f"a logit_bias must be -{_MAX_BIAS}..{_MAX_BIAS}")


def check_prompt(info: BaseInfo, prompt_T: npt.NDArray[np.int32]) -> None:
    """Raise unless the prompt has at least one token, all in the vocabulary, and fits into the context."""
    if prompt_T.ndim != 1 or prompt_T.shape[0] == 0:
        raise _bad("the prompt must have at least one token")
    if prompt_T.shape[0] > info.max_context:
        raise EngineError(
            "CONTEXT_OVERFLOW", f"the sequence has {prompt_T.shape[0]} tokens, the context {info.max_context}"
        )
    outside = (prompt_T < 0) | (prompt_T >= info.vocab_size)
    if outside.any():
        place = int(outside.argmax())
        raise EngineError(
            "TOKEN_OUT_OF_RANGE",
            f"token {int(prompt_T[place])} at position {place} is not in 0..{info.vocab_size - 1}",
        )


def token_limit(info: BaseInfo, prompt_length: int, params: SamplingParams) -> int:
    """Return the most tokens that a sample may have; CONTEXT_OVERFLOW when less is left than was asked for."""
    wanted = max(1, info.max_context - prompt_length) if params.max_tokens is None else params.max_tokens
    if prompt_length + wanted > info.max_context:
        raise EngineError(
            "CONTEXT_OVERFLOW",
            f"prompt length plus max_tokens exceeds the context: {prompt_length} + {wanted} > {info.max_context}",
        )
    return wanted


def _bad(message: str) -> EngineError:
    return EngineError("BAD_SAMPLING_PARAMS", message)
