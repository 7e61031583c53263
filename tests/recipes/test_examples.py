"""From rows to tokens: what is learned, what is only read, what is cut."""

from typing import Any

import numpy as np
import pytest

from treadle.recipes.chat import chat_datum
from treadle.recipes.configs import DataConfig
from treadle.recipes.examples import encode_prompt, encode_row, fit, prompt_of
from treadle.recipes.rows import DataError, Row

CONFIG = DataConfig()
TALK = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "Who are you?"},
    {"role": "assistant", "content": "I am Pip."},
]


def row(**values: Any) -> Row:
    return Row(values, "data.jsonl:1")


def learned(tokenizer: Any, example: Any) -> list[str]:
    """Returns the stretches of text that are learned."""
    borders = np.flatnonzero(np.diff(example.weights)) + 1
    parts = zip(np.split(example.tokens, borders), np.split(example.weights, borders), strict=True)
    return [tokenizer.decode(tokens.tolist()) for tokens, weights in parts if weights[0] > 0]


def test_pairs_messages_and_parts_are_the_same_conversation(tokenizer: Any) -> None:
    """However it is written down; the tokens are those that the demo trains on."""
    pair = encode_row(tokenizer, row(prompt="Hello", response="Hi."), CONFIG)
    forms = (
        row(messages=TALK[:2]),
        row(prompt="Hello", completion="Hi."),
        row(prompt=TALK[:1], response=TALK[1:2]),
        row(messages=[TALK[0], {"role": "assistant", "content": [{"type": "text", "text": "Hi."}]}]),
    )
    for form in forms:
        other = encode_row(tokenizer, form, CONFIG)
        assert other.tokens.tolist() == pair.tokens.tolist()
        assert other.weights.tolist() == pair.weights.tolist()
    named = encode_row(tokenizer, row(q="Hello", a="Hi."), DataConfig(prompt_column="q", response_column="a"))
    assert named.tokens.tolist() == pair.tokens.tolist()
    datum, expected = pair.datum(), chat_datum(tokenizer, TALK[:2])
    assert datum.model_input.to_ints() == expected.model_input.to_ints()
    for name in ("target_tokens", "weights"):
        assert datum.array(name).tolist() == expected.array(name).tolist()


def test_only_responses_are_learned_and_their_end(tokenizer: Any) -> None:
    """All of a conversation's, or the last alone; whole texts where there are no roles."""
    both = encode_row(tokenizer, row(messages=TALK), CONFIG)
    assert learned(tokenizer, both) == ["Hi.<|im_end|>", "I am Pip.<|im_end|>"]
    assert tokenizer.decode(both.tokens.tolist()) == tokenizer.apply_chat_template(TALK, tokenize=False).rstrip("\n")
    last = encode_row(tokenizer, row(messages=TALK), CONFIG, "last")
    assert learned(tokenizer, last) == ["I am Pip.<|im_end|>"]
    text = encode_row(tokenizer, row(text="Once upon a time"), CONFIG)
    assert learned(tokenizer, text) == ["Once upon a time" + tokenizer.eos_token]
    plain = encode_row(tokenizer, row(prompt="One, two,", response=" three"), DataConfig(chat=False))
    assert learned(tokenizer, plain) == [" three" + tokenizer.eos_token]


def test_a_prompt_is_a_row_without_its_answer(tokenizer: Any) -> None:
    """As the sampler gets it: the template opens the assistant's turn."""
    messages = prompt_of(row(messages=TALK), CONFIG)
    assert messages == TALK[:3]
    text = tokenizer.decode(encode_prompt(tokenizer, messages, CONFIG))
    assert text.endswith("Who are you?<|im_end|>\n<|im_start|>assistant\n")
    with pytest.raises(DataError, match="no message to answer"):
        prompt_of(row(messages=TALK[1:2]), CONFIG)


def test_too_long_samples_are_trimmed_dropped_or_refused(tokenizer: Any) -> None:
    """What was cut is counted and the first places are named."""
    examples = [
        encode_row(tokenizer, Row({"prompt": "Hello", "response": "a b c " * n}, f"d:{n}"), CONFIG) for n in (1, 9, 4)
    ]
    longest = len(examples[2].tokens)
    kept, cuts = fit(examples, longest, "trim")
    assert [len(example.tokens) for example in kept] == [len(examples[0].tokens), longest, longest]
    assert (cuts.num_trimmed, cuts.tokens_trimmed) == (1, len(examples[1].tokens) - longest)
    assert "1 trimmed by" in str(cuts)
    assert "(d:9)" in str(cuts)
    kept, cuts = fit(examples, longest, "drop")
    assert [example.where for example in kept] == ["d:1", "d:4"]
    assert cuts.num_dropped == 1
    kept, cuts = fit(examples, 4, "trim")
    assert not kept
    assert cuts.num_dropped == 3
    with pytest.raises(DataError, match=f"d:9: {len(examples[1].tokens)} tokens, at most {longest} fit"):
        fit(examples, longest, "error")


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"question": "x"}, "there is no column messages, prompt or text; there are question"),
        ({"prompt": "x"}, "the response is missing"),
        ({"prompt": "x", "response": 3}, "column 'response': text was expected, not 3"),
        ({"prompt": "", "response": "x"}, "column 'prompt': text was expected, not ''"),
        ({"messages": "x"}, "column 'messages': a list of messages was expected, not 'x'"),
        ({"messages": [{"role": "asistant", "content": "x"}]}, "column 'messages[0]': the role is 'asistant', not one"),
        ({"messages": [TALK[0], {"role": "assistant"}]}, "column 'messages[1]': content is missing, not text"),
        ({"messages": ["x"]}, "column 'messages[0]': a message is an object"),
        ({"messages": TALK[:3]}, "the last message must be the assistant's"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, TALK[1]]},
            "column 'messages[0]': content has a part that is not text",
        ),
        (
            {"messages": [TALK[0], {"role": "assistant", "content": None, "tool_calls": [{}]}]},
            "column 'messages[1]': tool calls cannot be learned",
        ),
    ],
)
def test_a_row_that_cannot_be_used_says_why(tokenizer: Any, values: dict, problem: str) -> None:
    """With its place and column."""
    with pytest.raises(DataError) as caught:
        encode_row(tokenizer, row(**values), CONFIG)
    assert str(caught.value).startswith("data.jsonl:1: ")
    assert problem in str(caught.value)


def test_a_chosen_column_must_be_there(tokenizer: Any) -> None:
    """The error lists those that are."""
    with pytest.raises(DataError, match="column 'q': there is no such column; there are prompt, response"):
        encode_row(tokenizer, row(prompt="x", response="y"), DataConfig(prompt_column="q"))
