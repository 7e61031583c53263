"""Answers in OpenAI's shapes, whole and as streams of chunks, from samples as they come. Knows no calls."""

import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, Final, Protocol

from treadle.v1 import sampling_pb2
from treadle_gateway.http.exchange import Json
from treadle_gateway.http.openai.choices import Choice, Drawn, chat_logprobs, completion_logprobs, drawn_tokens
from treadle_gateway.text.text_stream import Piece
from treadle_gateway.text.tokenizer import BaseTokenizer

_FINGERPRINT: Final = f"treadle-{version('treadle')}"


AboutPrompt = sampling_pb2.SampleResponse | sampling_pb2.StreamSampleResponse
"""Both say the same of a prompt."""


@dataclass
class Usage:
    """Tokens of a request."""

    prompt: int = 0
    sampled: int = 0
    cached: int = 0

    def json(self) -> Json:
        """Returns `usage`."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.sampled,
            "total_tokens": self.prompt + self.sampled,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


@dataclass(frozen=True)
class Frame:
    """What every answer to one request has, and how its texts are made."""

    name: str
    model: str
    tokenizer: BaseTokenizer
    stops: Sequence[str]
    ends: frozenset[int]
    with_logprobs: bool
    include_usage: bool
    created: int = field(default_factory=lambda: int(time.time()))

    def head(self, kind: str) -> Json:
        """Returns the fields that an answer, or each chunk of one, begins with."""
        return {
            "id": self.name,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": _FINGERPRINT,
        }

    def choice(self, index: int, offset: int = 0) -> Choice:
        """Returns an empty choice."""
        return Choice(index, self.tokenizer, self.stops, self.ends, offset)


class Shape(Protocol):
    """How one kind of answer is written."""

    kind: str
    chunk_kind: str

    def whole(self, choice: Choice) -> Json:
        """Returns a finished choice."""

    def opening(self, choice: Choice) -> Json | None:
        """Returns the first delta of a choice, None if it has nothing to say."""

    def delta(self, choice: Choice, piece: Piece[Drawn]) -> Json:
        """Returns what came to a choice."""

    def closing(self, choice: Choice) -> Json:
        """Returns the last delta of a choice."""


class ChatShape:
    """Choices of chat completions."""

    kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def __init__(self, frame: Frame) -> None:
        self._frame = frame

    def whole(self, choice: Choice) -> Json:
        """Returns a message."""
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        return {
            "index": choice.index,
            "message": message,
            "logprobs": self._logprobs(choice.tokens),
            "finish_reason": choice.finish_reason,
        }

    def opening(self, choice: Choice) -> Json | None:
        """Says whose words follow."""
        return _chat_delta(choice, {"role": "assistant", "content": ""})

    def delta(self, choice: Choice, piece: Piece[Drawn]) -> Json:
        """Returns new words."""
        return _chat_delta(choice, {"content": piece.text}) | {"logprobs": self._logprobs(piece.tokens)}

    def closing(self, choice: Choice) -> Json:
        """Says why there are no more."""
        return _chat_delta(choice, {}) | {"finish_reason": choice.finish_reason}

    def _logprobs(self, tokens: Sequence[Drawn]) -> Json | None:
        return chat_logprobs(tokens, self._frame.tokenizer) if self._frame.with_logprobs else None


def _chat_delta(choice: Choice, delta: Json) -> Json:
    return {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}


@dataclass(frozen=True)
class Echo:
    """A prompt that stands before its completions."""

    text: str
    tokens: Sequence[Drawn] = ()


class TextShape:
    """Choices of completions; `echoes` has the prompt of each choice that is echoed."""

    kind = chunk_kind = "text_completion"

    def __init__(self, frame: Frame) -> None:
        self._frame = frame
        self.echoes: dict[int, Echo] = {}

    def whole(self, choice: Choice) -> Json:
        """Returns a text."""
        echo = self.echoes.get(choice.index, Echo(""))
        return self._json(choice, echo.text + choice.text, [*echo.tokens, *choice.tokens], choice.finish_reason)

    def opening(self, choice: Choice) -> Json | None:
        """Returns the prompt, if it is echoed."""
        echo = self.echoes.get(choice.index)
        return None if echo is None else self._json(choice, echo.text, echo.tokens, None)

    def delta(self, choice: Choice, piece: Piece[Drawn]) -> Json:
        """Returns new text."""
        return self._json(choice, piece.text, piece.tokens, None)

    def closing(self, choice: Choice) -> Json:
        """Says why there is no more."""
        return self._json(choice, "", (), choice.finish_reason)

    def _json(self, choice: Choice, text: str, tokens: Sequence[Drawn], finish_reason: str | None) -> Json:
        logprobs = completion_logprobs(tokens, self._frame.tokenizer) if self._frame.with_logprobs else None
        return {"index": choice.index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}


def take_whole(choice: Choice, sequence: sampling_pb2.SampledSequence) -> Choice:
    """Returns the choice with all of a sample in it."""
    top = sequence.topk_logprobs if sequence.HasField("topk_logprobs") else None
    choice.take(drawn_tokens(sequence.tokens, sequence.logprobs, top), sequence.stop_reason)
    return choice


def whole_answer(frame: Frame, shape: Shape, choices: Sequence[Choice], usage: Usage) -> Json:
    """Returns the answer to a request that was not streamed."""
    return frame.head(shape.kind) | {"choices": [shape.whole(choice) for choice in choices], "usage": usage.json()}


class StreamedAnswer:
    """The same as a stream of chunks; `choices` has what was said so far."""

    def __init__(self, frame: Frame, shape: Shape, num_samples: int, usage: Usage) -> None:
        self._frame = frame
        self._shape = shape
        self._num_samples = num_samples
        self.usage = usage
        self.choices: dict[int, Choice] = {}

    async def chunks(
        self, messages: AsyncIterator[tuple[int, sampling_pb2.StreamSampleResponse]]
    ) -> AsyncGenerator[Json, None]:
        """Yields the chunks that each message brings; the caller closes `messages`."""
        async for place, message in messages:
            self.usage.cached += message.prompt_cache_hit_tokens
            index = place * self._num_samples + message.index
            if index not in self.choices:
                choice = self.choices[index] = self.begin(index, message)
                opening = self._shape.opening(choice)
                if opening is not None:
                    yield self._chunk([opening])
            for part in self._parts(self.choices[index], message):
                yield self._chunk([part])

    def begin(self, index: int, message: AboutPrompt) -> Choice:
        """Returns the choice that a message is the first of."""
        return self._frame.choice(index)

    def usage_chunk(self) -> Json:
        """Returns the chunk that says what was used."""
        return self._frame.head(self._shape.chunk_kind) | {"choices": [], "usage": self.usage.json()}

    def whole(self) -> Json:
        """Returns what the stream said, as one answer."""
        return whole_answer(self._frame, self._shape, [self.choices[i] for i in sorted(self.choices)], self.usage)

    def _parts(self, choice: Choice, message: sampling_pb2.StreamSampleResponse) -> Iterator[Json]:
        top = message.topk_logprobs if message.HasField("topk_logprobs") else None
        drawn = drawn_tokens(message.tokens, message.logprobs, top)
        self.usage.sampled += len(drawn)
        piece = choice.take(drawn, message.stop_reason)
        if piece.text or (piece.tokens and self._frame.with_logprobs):
            yield self._shape.delta(choice, piece)
        if choice.finish_reason:
            yield self._shape.closing(choice)

    def _chunk(self, choices: list[Any]) -> Json:  # Any: JSON of a choice.
        chunk = self._frame.head(self._shape.chunk_kind) | {"choices": choices}
        return chunk | {"usage": None} if self._frame.include_usage else chunk
