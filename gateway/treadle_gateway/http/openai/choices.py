"""One choice of an answer: sampled tokens to text, log-probabilities and a reason to end, whole or as it grows.

Knows the two shapes in which OpenAI answers log-probabilities; knows no calls.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from treadle.tensors import numpy_from_tensor
from treadle.v1 import sampling_pb2, types_pb2
from treadle.wire import decode_tokens
from treadle_gateway.text.text_stream import Piece, TextStream
from treadle_gateway.text.tokenizer import BaseTokenizer

_REASONS: Final = {sampling_pb2.STOP_REASON_STOP: "stop", sampling_pb2.STOP_REASON_LENGTH: "length"}
# What OpenAI says in place of a number that is not finite.
_UNLIKELY: Final = -9999.0


@dataclass(frozen=True, slots=True)
class Drawn:
    """A token of a text, with what is known of its position."""

    token: int
    logprob: float | None  # None for the first token of a prompt
    top: Sequence[tuple[int, float]] = ()
    start: int = 0  # where its text begins, in characters


class Choice:
    """One sample on its way to a caller."""

    def __init__(
        self, index: int, tokenizer: BaseTokenizer, stops: Sequence[str], ends: frozenset[int], offset: int = 0
    ) -> None:
        """Starts an empty text.

        Args:
            index: its place in the answer.
            tokenizer: the base's.
            stops: stop strings; the text ends before the first.
            ends: tokens that end a sample and are no part of its text.
            offset: characters that stand before it in the text that is answered.
        """
        self.index = index
        self.finish_reason: str | None = None
        self.text = ""
        self.tokens: list[Drawn] = []
        self.num_tokens = 0
        self.total_logprob = 0.0
        self._tokenizer = tokenizer
        self._ends = ends
        self._offset = offset
        self._stream: TextStream[Drawn] = TextStream(stops)

    def take(self, drawn: Iterable[Drawn], stop: sampling_pb2.StopReason) -> Piece[Drawn]:
        """Takes new tokens, and why they are the last ones; returns what can be shown."""
        pieces: list[Piece[Drawn]] = []
        tokens = list(drawn)
        self.num_tokens += len(tokens)
        self.total_logprob += sum(token.logprob or 0.0 for token in tokens)
        if stop == sampling_pb2.STOP_REASON_STOP and tokens and tokens[-1].token in self._ends:
            tokens.pop()
        for one in tokens:
            placed = Drawn(one.token, one.logprob, one.top, self._offset + self._stream.length)
            content = b"" if self._tokenizer.is_special(one.token) else self._tokenizer.token_bytes(one.token)
            pieces.append(self._stream.push(placed, content))
        if stop:
            pieces.append(self._stream.finish())
            self.finish_reason = _REASONS.get(stop, "stop")
        piece = Piece("".join(piece.text for piece in pieces), [token for piece in pieces for token in piece.tokens])
        self.text += piece.text
        self.tokens += piece.tokens
        return piece


def drawn_tokens(
    tokens: types_pb2.Tokens, logprobs: types_pb2.Tensor, top: sampling_pb2.TopLogprobs | None
) -> list[Drawn]:
    """Returns the tokens of a message with their numbers; NaN, at the beginning of a prompt, becomes None."""
    ids = decode_tokens(tokens).tolist()
    values = numpy_from_tensor(logprobs, "logprobs").tolist()
    tops = _tops(top, len(ids)) if top is not None else [()] * len(ids)
    return [
        Drawn(token, None if math.isnan(value) else value, likeliest)
        for token, value, likeliest in zip(ids, values, tops, strict=True)
    ]


def _tops(top: sampling_pb2.TopLogprobs, length: int) -> list[Sequence[tuple[int, float]]]:
    if not top.k:
        return [()] * length
    ids = decode_tokens(top.tokens).reshape(length, top.k).tolist()
    values = numpy_from_tensor(top.logprobs, "topk_logprobs").reshape(length, top.k).tolist()
    rows = [zip(*row, strict=True) for row in zip(ids, values, strict=True)]
    return [[(token, value) for token, value in row if token >= 0] for row in rows]


def chat_logprobs(tokens: Sequence[Drawn], tokenizer: BaseTokenizer) -> dict[str, Any]:
    """Returns `logprobs` of a chat completion's choice."""

    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        content = tokenizer.token_bytes(token)
        return {"token": content.decode(errors="replace"), "logprob": _number(logprob), "bytes": list(content)}

    content = [
        {**entry(one.token, one.logprob), "top_logprobs": [entry(*likely) for likely in one.top]} for one in tokens
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(tokens: Sequence[Drawn], tokenizer: BaseTokenizer) -> dict[str, Any]:
    """Returns `logprobs` of a completion's choice: columns, the token itself among the likeliest of its position."""

    def table(one: Drawn) -> dict[str, float] | None:
        if one.logprob is None:
            return None
        likely = {_name(tokenizer, token): _number(value) for token, value in one.top}
        likely.setdefault(_name(tokenizer, one.token), _number(one.logprob))
        return likely

    return {
        "tokens": [_name(tokenizer, one.token) for one in tokens],
        "token_logprobs": [None if one.logprob is None else _number(one.logprob) for one in tokens],
        "top_logprobs": [table(one) for one in tokens],
        "text_offset": [one.start for one in tokens],
    }


def _name(tokenizer: BaseTokenizer, token: int) -> str:
    """Returns a token's text, or its bytes written out where it is a part of a character."""
    content = tokenizer.token_bytes(token)
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


def _number(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else _UNLIKELY
