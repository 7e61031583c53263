"""From rows to tokens with weights: the chat template, loss only on responses, and what was cut to fit.

Knows the columns that rows may have and a tokenizer's three methods; knows no service.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from treadle.recipes.chat import ChatTokenizer, Message
from treadle.recipes.configs import DataConfig, DpoConfig, OverLong, TrainOn
from treadle.recipes.rows import DataError, Row
from treadle.types import Datum, ModelInput, TensorData

ROLES: Final = ("system", "developer", "user", "assistant", "tool")
_PLAIN: Final = {chat: DataConfig(chat=chat) for chat in (False, True)}
_RESPONSES: Final = ("response", "completion", "output", "answer")


class Segment(NamedTuple):
    """A piece of text that is read or learned."""

    text: str
    learned: bool


@dataclass(frozen=True, eq=False)
class Example:
    """A training sequence: `tokens` int32 [n], and `weights` float32 [n], how much each token's loss counts."""

    tokens: NDArray[np.int32]
    weights: NDArray[np.float32]
    where: str

    @property
    def num_learned(self) -> int:
        """Tokens that are learned; the first has nothing to be learned from."""
        return int(np.count_nonzero(self.weights[1:]))

    def datum(self, scale: float = 1.0) -> Datum:
        """Returns the cross_entropy datum, its weights multiplied by `scale`."""
        inputs = {
            "target_tokens": TensorData.from_numpy(self.tokens[1:]),
            "weights": TensorData.from_numpy(self.weights[1:] * np.float32(scale)),
        }
        return Datum(ModelInput.from_ints(self.tokens[:-1]), inputs)


@dataclass
class Cuts:
    """What had to be cut for its length."""

    max_length: int
    num_trimmed: int = 0
    num_dropped: int = 0
    tokens_trimmed: int = 0
    longest: list[str] = field(default_factory=list)
    """Places of the first samples that were too long."""

    def __str__(self) -> str:
        if not self.num_trimmed + self.num_dropped:
            return f"no sample is longer than {self.max_length} tokens"
        return (
            f"longer than {self.max_length} tokens: {self.num_trimmed} trimmed by {self.tokens_trimmed} tokens, "
            f"{self.num_dropped} dropped ({', '.join(self.longest)}{' ...' if self._many else ''})"
        )

    @property
    def _many(self) -> bool:
        return self.num_trimmed + self.num_dropped > len(self.longest)


def messages_of(row: Row, config: DataConfig) -> list[Message] | None:
    """Returns the row's conversation, or its prompt and response as one; None for a row of plain text.

    Raises:
        DataError: the row has none of the known columns, or they do not hold what they should.
    """
    column = _column(row, config.messages_column, ("messages",))
    if column:
        return _checked_messages(row, column)
    prompt = _column(row, config.prompt_column, ("prompt",))
    if prompt:
        response = _column(row, config.response_column, _RESPONSES)
        asked = _as_messages(row, prompt, "user")
        return [*asked, *_as_messages(row, response, "assistant")] if response else asked
    if _column(row, config.text_column, ("text",)):
        return None
    raise row.error(f"there is no column messages, prompt or text; there are {', '.join(row.values) or 'none'}")


def prompt_of(row: Row, config: DataConfig) -> list[Message]:
    """Returns the row's conversation up to where the assistant answers; raises DataError when there is none."""
    messages = messages_of(row, config)
    if messages is None:
        messages = [{"role": "user", "content": _string(row, config.text_column or "text")}]
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages:
        raise row.error("there is no message to answer")
    return messages


def encode_prompt(tokenizer: ChatTokenizer, messages: Sequence[Message], config: DataConfig) -> list[int]:
    """Returns the tokens of a conversation up to where the assistant answers."""
    text = _rendered(tokenizer, messages, prompt=True) if _templated(tokenizer, config) else _joined(messages)
    return list(tokenizer.encode(text, add_special_tokens=False))


def encode_row(tokenizer: ChatTokenizer, row: Row, config: DataConfig, train_on: TrainOn = "all") -> Example:
    """Returns the row as tokens; responses are learned, all else is only read; plain text is learned whole.

    Raises:
        DataError: the row cannot be used.
    """
    messages = messages_of(row, config)
    if messages is None:
        text = _string(row, _column(row, config.text_column, ("text",)))
        segments = [Segment(text, True), Segment(_end_of_text(tokenizer), True)]
    elif messages[-1]["role"] != "assistant":
        raise row.error("the last message must be the assistant's, or the response is missing")
    else:
        segments = _segments(tokenizer, messages, row, config, train_on)
    return encode_segments(tokenizer, segments, row.where)


def encode_pair(tokenizer: ChatTokenizer, row: Row, config: DpoConfig) -> tuple[Example, Example]:
    """Returns the chosen and the rejected response to one prompt, of which the last message counts.

    Either side is a text, or messages: those of the answer alone, or the whole conversation.

    Raises:
        DataError: the row cannot be used.
    """
    sides = []
    for column in (config.chosen_column, config.rejected_column):
        if row.values.get(column) is None:
            raise row.error(f"there is no such column; there are {', '.join(row.values)}", column)
        answer = _as_messages(row, column, "assistant")
        whole = answer if answer[0]["role"] != "assistant" else [*prompt_of(row, config), *answer]
        sides.append(encode_row(tokenizer, Row({"messages": whole}, row.where), _PLAIN[config.chat], "last"))
    return sides[0], sides[1]


def encode_segments(tokenizer: ChatTokenizer, segments: Sequence[Segment], where: str) -> Example:
    """Returns pieces of text as one sequence; each is encoded by itself, so that borders are those of sampling."""
    parts = [(tokenizer.encode(text, add_special_tokens=False), learned) for text, learned in segments if text]
    tokens = np.array([token for ids, _ in parts for token in ids], np.int32)
    weights = np.array([float(learned) for ids, learned in parts for _ in ids], np.float32)
    example = Example(tokens, weights, where)
    if not example.num_learned:
        raise DataError(where, "there is no token to learn from")
    return example


def fit(examples: Sequence[Example], max_length: int, over_long: OverLong) -> tuple[list[Example], Cuts]:
    """Returns the samples with at most `max_length` tokens each, and what was cut to get there.

    A sample that would lose all its learned tokens is dropped.

    Raises:
        DataError: a sample is too long and `over_long` is "error".
    """
    kept: list[Example] = []
    cuts = Cuts(max_length)
    for example in examples:
        excess = len(example.tokens) - max_length
        if excess <= 0:
            kept.append(example)
            continue
        if over_long == "error":
            raise DataError(example.where, f"{len(example.tokens)} tokens, at most {max_length} fit")
        if len(cuts.longest) < 3:
            cuts.longest.append(example.where)
        shorter = Example(example.tokens[:max_length], example.weights[:max_length], example.where)
        if over_long == "trim" and shorter.num_learned:
            kept.append(shorter)
            cuts.num_trimmed += 1
            cuts.tokens_trimmed += excess
        else:
            cuts.num_dropped += 1
    return kept, cuts


def fit_pairs(
    pairs: Sequence[tuple[Example, Example]], max_length: int, over_long: OverLong
) -> tuple[list[tuple[Example, Example]], Cuts]:
    """Returns the pairs of which both sides are left after `fit`, and what was cut."""
    cuts = Cuts(max_length)
    kept = []
    for pair in pairs:
        sides, cut = fit(pair, max_length, over_long)
        cuts.num_trimmed += cut.num_trimmed
        cuts.tokens_trimmed += cut.tokens_trimmed
        cuts.num_dropped += len(sides) < 2
        cuts.longest += cut.longest[: max(0, 3 - len(cuts.longest))]
        if len(sides) == 2:
            kept.append((sides[0], sides[1]))
    return kept, cuts


def _segments(
    tokenizer: ChatTokenizer, messages: list[Message], row: Row, config: DataConfig, train_on: TrainOn
) -> list[Segment]:
    """Returns the conversation's text cut where assistant messages begin and end."""
    if not _templated(tokenizer, config):
        prompt = _joined(messages[:-1])
        return [Segment(prompt, False), Segment(messages[-1]["content"] + _end_of_text(tokenizer), True)]
    segments: list[Segment] = []
    done = ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        last = index == len(messages) - 1
        head = _rendered(tokenizer, messages[:index], prompt=True)
        whole = _rendered(tokenizer, messages[: index + 1]).rstrip("\n")
        if not head.startswith(done) or not whole.startswith(head):
            raise row.error("the chat template changes earlier messages; cut the conversation after its first answer")
        segments += [
            Segment(head[len(done) :], False),
            Segment(whole[len(head) :], last or train_on == "all"),
        ]
        done = whole
    return segments


def _templated(tokenizer: ChatTokenizer, config: DataConfig) -> bool:
    return config.chat and getattr(tokenizer, "chat_template", None) is not None


def _rendered(tokenizer: ChatTokenizer, messages: Sequence[Message], *, prompt: bool = False) -> str:
    return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt))


def _joined(messages: Sequence[Message]) -> str:
    return "\n".join(message["content"] for message in messages)


def _end_of_text(tokenizer: ChatTokenizer) -> str:
    return getattr(tokenizer, "eos_token", None) or ""


def _column(row: Row, chosen: str, usual: Sequence[str]) -> str:
    if chosen and chosen not in row.values:
        raise row.error(f"there is no such column; there are {', '.join(row.values)}", chosen)
    return chosen or next((name for name in usual if row.values.get(name) is not None), "")


def _string(row: Row, column: str) -> str:
    value = row.values.get(column)
    if not isinstance(value, str) or not value:
        raise row.error(f"text was expected, not {_shown(value)}", column)
    return value


def _as_messages(row: Row, column: str, role: str) -> list[Message]:
    if isinstance(row.values[column], list):
        return _checked_messages(row, column)
    return [{"role": role, "content": _string(row, column)}]


def _checked_messages(row: Row, column: str) -> list[Message]:
    given = row.values[column]
    if not isinstance(given, list) or not given:
        raise row.error(f"a list of messages was expected, not {_shown(given)}", column)
    return [_message(row, f"{column}[{index}]", message) for index, message in enumerate(given)]


def _message(row: Row, place: str, message: Any) -> Message:  # Any: parsed JSON.
    if not isinstance(message, Mapping):
        raise row.error(f"a message is an object with role and content, not {_shown(message)}", place)
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise row.error(f"the role is {_shown(role)}, not one of {', '.join(ROLES)}", place)
    if message.get("tool_calls"):
        raise row.error("tool calls cannot be learned: give them as text in content", place)
    if isinstance(content, list):
        content = "".join(_part(row, place, part) for part in content)
    if not isinstance(content, str):
        raise row.error(f"content is {_shown(content)}, not text", place)
    return {"role": str(role), "content": content}


def _part(row: Row, place: str, part: Any) -> str:  # Any: parsed JSON.
    if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise row.error(f"content has a part that is not text: {_shown(part)}", place)
    return str(part["text"])


def _shown(value: object) -> str:
    return "missing" if value is None else repr(value)[:60]
