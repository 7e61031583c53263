"""What goes into a decoder, what comes out of it, and what it keeps about both meanwhile.

Knows no tensors beyond holding them, and no clock.
"""

# Shape suffix legend
#   T = tokens of a prompt or text, K = targets per position, V = vocabulary

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from torch import Tensor

from treadle_engine.errors import EngineError
from treadle_engine.kv_cache import Slot, TextCache
from treadle_engine.lora import AdapterWeights
from treadle_engine.prefix_cache import BlockKeys
from treadle_engine.sampling import TokenHistory
from treadle_engine.sampling_params import SamplingParams
from treadle_engine.stops import StopReason, StopRule

PACKED_ROWS = 512
"""Tokens of a text whose log-probs are asked for that are read in one piece, as a trainer reads them."""

ADVANCE = 32
"""Tokens of a sample that its owner is charged for when it gets a place; the rest as they are drawn."""

IntTable = npt.NDArray[np.int32]
FloatTable = npt.NDArray[np.float32]


@dataclass(frozen=True)
class CacheCounts:
    """What a decoder holds of keys and values, in positions, and what came of it since it started.

    Of the positions that were read, `num_cached` were taken from kept prefixes.
    """

    num_positions: int = 0
    max_positions: int = 0
    num_read: int = 0
    num_cached: int = 0
    num_preemptions: int = 0


@dataclass(frozen=True, eq=False)
class SampleRequest:
    """A prompt (int32 [T]) and what to draw from it; `num_samples` 0 asks for the prompt's log-probs alone.

    Of the prompt, `prompt_logprobs` asks for the log-prob of every token, `prompt_top` for the so many likeliest
    tokens at every position, `targets_TK` (int32, -1 for none) for the log-probs of given tokens there; `last_n`
    limits all three to the last positions. `num_top` asks for the likeliest tokens at every drawn position.
    `owner` is whoever shares one turn in the queue; nothing else follows from it.
    """

    prompt_T: npt.NDArray[np.int32]
    params: SamplingParams = field(default_factory=SamplingParams)
    weights: AdapterWeights | None = None
    num_samples: int = 1
    prompt_logprobs: bool = False
    owner: str = ""
    num_top: int = 0
    prompt_top: int = 0
    targets_TK: IntTable | None = None
    last_n: int | None = None

    @property
    def scores_prompt(self) -> bool:
        """Tell whether anything about the prompt itself is asked for."""
        return self.prompt_logprobs or not self.num_samples or self.prompt_top > 0 or self.targets_TK is not None

    @property
    def first_scored(self) -> int:
        """First position whose log-probs are asked for; the prompt's length when none is."""
        length = int(self.prompt_T.shape[0])
        if not self.scores_prompt:
            return length
        return 1 if self.last_n is None else max(1, length - self.last_n)


@dataclass(frozen=True, eq=False)
class TopTokens:
    """The likeliest tokens of one or more positions, likeliest first: ids int32 and log-probs float32, same shape."""

    ids: IntTable
    logprobs: FloatTable


@dataclass(frozen=True)
class TokenEvent:
    """Sample `index` of a request has one more token; `stop` is set with its last one."""

    request: int
    index: int
    token: int
    logprob: float
    stop: StopReason | None
    top: TopTokens | None = None


@dataclass(frozen=True, eq=False)
class PromptEvent:
    """What was asked for about the prompt, NaN (and id -1) where there is none; comes before the request's tokens.

    `num_cached` of its tokens were found in the prefix cache. Sent for every request, whatever it asks for.
    """

    request: int
    logprobs_T: FloatTable
    top: TopTokens | None = None
    targets_TK: FloatTable | None = None
    num_cached: int = 0


@dataclass(frozen=True)
class FailedEvent:
    """The request ended without its result."""

    request: int
    error: EngineError


DecodeEvent = TokenEvent | PromptEvent | FailedEvent


@dataclass(eq=False)
class Prompt:
    """A request inside the decoder."""

    number: int
    request: SampleRequest
    rule: StopRule
    limit: int
    keys: BlockKeys
    num_unfinished: int
    reading: Reading | None = None
    logits_V: Tensor | None = None
    num_claimed: int = 0
    unborn: list[int] = field(default_factory=list)
    paused: list[Sample] = field(default_factory=list)

    @property
    def owner(self) -> str:
        """Who asked."""
        return self.request.owner

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return int(self.request.prompt_T.shape[0])

    @property
    def num_packed(self) -> int:
        """Tokens at the start that are read in one piece, with a trainer's bits.

        The last token is not among them, so that a prompt is scored alike whether samples are drawn from it or not.
        Such a text has its numbers to itself: it neither finds kept blocks nor leaves any.
        """
        whole = self.request.scores_prompt and self.request.last_n is None
        return min(PACKED_ROWS, self.length - 1) if whole else 0

    @property
    def num_claims(self) -> int:
        """Places that the request needs in all."""
        return max(1, self.request.num_samples)

    @property
    def is_waiting(self) -> bool:
        """Tell whether it needs another place."""
        return bool(self.paused) or self.num_claimed < self.num_claims

    @property
    def advance(self) -> int:
        """Tokens charged with a sample's place."""
        return min(self.limit, ADVANCE)


@dataclass(eq=False)
class Sample:
    """A sequence that decodes; `slot` holds all of its tokens but the newest, and is None while it is paused."""

    prompt: Prompt
    index: int
    stream: np.random.Generator
    history: TokenHistory | None = None
    tokens: list[int] = field(default_factory=list)
    slot: Slot | None = None

    @property
    def text_T(self) -> npt.NDArray[np.int32]:
        """Prompt and tokens but the newest: what a slot holds."""
        return np.concatenate([self.prompt.request.prompt_T, np.array(self.tokens[:-1], dtype=np.int32)])


@dataclass(eq=False)
class Reading:
    """A text on its way into a cache: a prompt, or what a paused sample had when it lost its place."""

    prompt: Prompt
    text_T: npt.NDArray[np.int32]
    keys: list[bytes]
    cache: TextCache
    num_rows: int
    num_cached: int = 0
    sample: Sample | None = None
    logprobs_T: FloatTable | None = None
    top: TopTokens | None = None
    targets_TK: FloatTable | None = None

    @property
    def most_cached(self) -> int:
        """Positions that may come from the prefix cache: those behind are wanted for what the base says there."""
        if self.prompt.num_packed:
            return 0
        if self.sample is not None:
            return self.num_rows
        return min(self.num_rows, self.prompt.request.first_scored) - 1

    @property
    def next_packed(self) -> int:
        """Tokens that have to be read next in one piece, 0 if there is no such piece."""
        return self.prompt.num_packed if self.cache.length == 0 else 0

    @property
    def is_done(self) -> bool:
        """Tell whether all of the text is in the cache."""
        return self.cache.length == self.num_rows
