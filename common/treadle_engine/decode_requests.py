"""What goes into a decoder and what comes out of it, and the order in which waiting samples get a place.

Knows no tensors beyond holding them, and no clock: the order follows from what was asked for, by whom, and from
what finished.
"""

# Shape suffix legend
#   T = tokens of a prompt, V = vocabulary

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from torch import Tensor

from treadle_engine.errors import EngineError
from treadle_engine.kv_cache import PromptCache, Slot
from treadle_engine.lora import AdapterWeights
from treadle_engine.sampling_params import SamplingParams
from treadle_engine.stops import StopReason, StopRule


@dataclass(frozen=True, eq=False)
class SampleRequest:
    """A prompt (int32 [T]) and what to draw from it; `num_samples` 0 asks for the prompt's log-probs alone.

    `owner` is whoever shares one turn in the queue; nothing else follows from it.
    """

    prompt_T: npt.NDArray[np.int32]
    params: SamplingParams = field(default_factory=SamplingParams)
    weights: AdapterWeights | None = None
    num_samples: int = 1
    prompt_logprobs: bool = False
    owner: str = ""


@dataclass(frozen=True)
class TokenEvent:
    """Sample `index` of a request has one more token; `stop` is set with its last one."""

    request: int
    index: int
    token: int
    logprob: float
    stop: StopReason | None


@dataclass(frozen=True, eq=False)
class PromptEvent:
    """The prompt's log-probs, float32 [T], NaN first; comes before the request's tokens."""

    request: int
    logprobs_T: npt.NDArray[np.float32]


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
    cache: PromptCache | None = None
    logprobs_T: npt.NDArray[np.float32] | None = None
    logits_V: Tensor | None = None
    num_claimed: int = 0
    unborn: list[int] = field(default_factory=list)
    num_unfinished: int = 0

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return int(self.request.prompt_T.shape[0])

    @property
    def num_rows(self) -> int:
        """Tokens that the base has to read: the last one of a text that is only scored predicts nothing asked for.

        So a scored text has the very rows that a trainer's forward over it has, and the same bits.
        """
        return self.length if self.request.num_samples else max(1, self.length - 1)

    @property
    def num_claims(self) -> int:
        """Places that the request needs in all."""
        return max(1, self.request.num_samples)

    @property
    def claim_cost(self) -> int:
        """Cache positions of the next claim; the first pays for the prompt's own cache too."""
        sample = self.length + self.limit if self.request.num_samples else 0
        return sample if self.num_claimed else sample + self.length


@dataclass(eq=False)
class Sample:
    """A sequence that decodes; `slot` holds all of its tokens but the newest."""

    prompt: Prompt
    index: int
    stream: np.random.Generator
    tokens: list[int] = field(default_factory=list)
    slot: Slot | None = None


class WaitingLine:
    """Requests with samples that have no place yet; the owner with the fewest places goes first."""

    def __init__(self) -> None:
        """Start empty."""
        self._queues: dict[str, deque[Prompt]] = {}
        self._held: Counter[str] = Counter()

    def add(self, prompt: Prompt) -> None:
        """Put a request at the end of its owner's queue."""
        self._queues.setdefault(prompt.request.owner, deque()).append(prompt)

    def head(self) -> Prompt | None:
        """Return the request that gets the next place."""
        if not self._queues:
            return None
        # min() takes the first of equals, and `claim` moves an owner to the end.
        return self._queues[min(self._queues, key=self._held.__getitem__)][0]

    def claim(self, prompt: Prompt) -> None:
        """Count one place for the head."""
        owner = prompt.request.owner
        queue = self._queues.pop(owner)
        prompt.num_claimed += 1
        self._held[owner] += 1
        if prompt.num_claimed == prompt.num_claims:
            queue.popleft()
        if queue:
            self._queues[owner] = queue

    def give_back(self, owner: str) -> None:
        """Count one place less."""
        self._held[owner] -= 1
        if self._held[owner] == 0:
            del self._held[owner]

    def remove(self, prompt: Prompt) -> None:
        """Forget a request's missing places."""
        queue = self._queues.get(prompt.request.owner)
        if queue is not None and prompt in queue:
            queue.remove(prompt)
            if not queue:
                del self._queues[prompt.request.owner]

    def __iter__(self) -> Iterator[Prompt]:
        """Iterate over the waiting requests."""
        for queue in self._queues.values():
            yield from queue
