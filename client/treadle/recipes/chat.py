"""Conversations as tokens: what a chat template makes of them, and which tokens to learn from.

Knows a tokenizer only through the three methods that it calls; knows no model and no service.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from treadle.types import Datum, ModelInput, TensorData

Message = dict[str, str]
"""`{"role": "system" | "user" | "assistant", "content": text}`."""


class ChatTokenizer(Protocol):
    """The part of a transformers tokenizer that recipes use."""

    # Any: transformers' own signature takes and returns unions without end.
    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        """Returns the template's rendering of a conversation."""

    def encode(self, text: str, **options: Any) -> list[int]:
        """Returns token ids."""

    def decode(self, token_ids: Sequence[int], **options: Any) -> str:
        """Returns text."""


def prompt_tokens(tokenizer: ChatTokenizer, messages: Iterable[Message]) -> list[int]:
    """Returns the tokens of a conversation up to where the assistant answers."""
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False)


def chat_datum(tokenizer: ChatTokenizer, messages: Sequence[Message]) -> Datum:
    """Returns a cross_entropy datum that learns the last message and only reads those before it.

    Raises:
        ValueError: the last message is not the assistant's.
    """
    if not messages or messages[-1]["role"] != "assistant":
        raise ValueError("a training conversation ends with a message of the role 'assistant'")
    prompt = prompt_tokens(tokenizer, messages[:-1])
    whole = tokenizer.apply_chat_template(list(messages), tokenize=False).rstrip("\n")
    head = tokenizer.apply_chat_template(list(messages[:-1]), tokenize=False, add_generation_prompt=True)
    answer = tokenizer.encode(whole[len(head) :], add_special_tokens=False)
    return completion_datum(prompt, answer)


def completion_datum(prompt: Sequence[int], answer: Sequence[int]) -> Datum:
    """Returns a cross_entropy datum: targets are the next tokens, weights 0 over the prompt and 1 over the answer."""
    tokens = np.array([*prompt, *answer], dtype=np.int64)
    weights = np.zeros(len(tokens) - 1, dtype=np.float32)
    weights[len(prompt) - 1 :] = 1.0
    inputs = {"target_tokens": TensorData.from_numpy(tokens[1:]), "weights": TensorData.from_numpy(weights)}
    return Datum(model_input=ModelInput.from_ints(tokens[:-1].tolist()), loss_fn_inputs=inputs)


def policy_datum(prompt: Sequence[int], answer: Sequence[int], logprobs: Sequence[float], advantage: float) -> Datum:
    """Returns a policy-gradient datum: the sampler's log-probs and one advantage over the answer, 0 over the prompt."""
    tokens = np.array([*prompt, *answer], dtype=np.int64)
    advantages = np.zeros(len(tokens) - 1, dtype=np.float32)
    advantages[len(prompt) - 1 :] = advantage
    sampled = np.zeros(len(tokens) - 1, dtype=np.float32)
    sampled[len(prompt) - 1 :] = logprobs
    inputs = {
        "target_tokens": TensorData.from_numpy(tokens[1:]),
        "logprobs": TensorData.from_numpy(sampled),
        "advantages": TensorData.from_numpy(advantages),
    }
    return Datum(model_input=ModelInput.from_ints(tokens[:-1].tolist()), loss_fn_inputs=inputs)


def read_conversations(path: Path) -> list[list[Message]]:
    """Returns the conversations of a JSONL file with `{"messages": [...]}` on each line.

    Raises:
        ValueError: a line is no such object; names the file and the line.
    """
    conversations: list[list[Message]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            messages = json.loads(line)["messages"]
            conversations.append([{"role": str(m["role"]), "content": str(m["content"])} for m in messages])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f'{path}:{number}: not a {{"messages": [...]}} object ({error})') from error
    return conversations
