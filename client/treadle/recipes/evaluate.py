"""Evaluation of a saved adapter or a base on rows: `treadle eval data.jsonl --model ADAPTER --metric exact_match`.

Exact match compares the likeliest answer with the row's response, a reward function scores it, and perplexity is
exp(mean -log p) per token of the responses, as `sft` would learn them. Trains nothing.
"""

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from treadle.client import ServiceClient
from treadle.names import is_adapter
from treadle.recipes.chat import ChatTokenizer
from treadle.recipes.configs import EvalConfig
from treadle.recipes.examples import encode_prompt, encode_row, messages_of, prompt_of
from treadle.recipes.job import choose_base
from treadle.recipes.reports import Observer, Report
from treadle.recipes.rewards import Reward, load_reward, score
from treadle.recipes.rows import Row, read_rows
from treadle.sampling import SamplingClient
from treadle.types import ModelInput, SamplingParams

_AT_ONCE = 64
"""Requests that are under way at the same time."""


@dataclass(frozen=True)
class EvalResult:
    """What was measured."""

    model: str
    metric: str
    value: float
    """Share of exact matches, mean reward, or perplexity."""
    rows: int
    tokens: int
    """Tokens drawn, or for perplexity scored."""


@dataclass(frozen=True)
class _Answer:
    """What became of one row; for perplexity, `worth` is the mean -log p of its `num_tokens`."""

    row: Row
    text: str
    worth: float
    num_tokens: int


def evaluate(service: ServiceClient, config: EvalConfig, observer: Observer | None = None) -> EvalResult:
    """Measures how well a model does on the rows of `config.data`.

    Raises:
        DataError: the data cannot be used; names file, line and column.
        BadInputError: there is no such reward function or base.
        TreadleError: what the service said.
    """
    observer = observer or Observer()
    model = config.model if is_adapter(config.model) else choose_base(service, config.model).model_name
    sampler = service.create_sampling_client(*((model, None) if is_adapter(model) else (None, model)))
    tokenizer = sampler.get_tokenizer()
    rows = read_rows(config)
    reward = load_reward(config.reward) if config.metric == "reward" else exact_match(config)
    answers: list[_Answer] = []
    mark = time.monotonic()
    for begin in range(0, len(rows), _AT_ONCE):
        some = rows[begin : begin + _AT_ONCE]
        if config.metric == "perplexity":
            found = list(_scored(sampler, tokenizer, some, config))
        else:
            found = list(_answered(sampler, tokenizer, some, config, reward, begin))
        answers += found
        value = _value(answers, config)
        num_tokens, before, mark = sum(one.num_tokens for one in found), mark, time.monotonic()
        observer.report(Report(len(answers), len(rows), {config.metric: value}, num_tokens, mark - before))
    if config.out:
        _write(Path(config.out), answers)
    return EvalResult(model, config.metric, value, len(rows), sum(answer.num_tokens for answer in answers))


def exact_match(config: EvalConfig) -> Reward:
    """Returns a reward that is 1 for the row's own response, but for surrounding space, and else 0."""

    def reward(values: Any, completion: str) -> float:  # Any: a row.
        messages = messages_of(Row(values, config.data), config) or []
        return float(bool(messages) and completion.strip() == messages[-1]["content"].strip())

    return reward


def _answered(
    sampler: SamplingClient,
    tokenizer: ChatTokenizer,
    rows: Sequence[Row],
    config: EvalConfig,
    reward: Reward,
    first: int,
) -> Iterator[_Answer]:
    handles = []
    for index, row in enumerate(rows, first):
        if config.metric == "exact_match":
            _require_response(row, config)
        prompt = encode_prompt(tokenizer, prompt_of(row, config), config)
        params = SamplingParams(
            max_tokens=config.max_tokens, temperature=config.temperature, seed=(config.seed << 20) + index
        )
        handles.append(sampler.sample(ModelInput.from_ints(prompt), 1, params))
    for row, handle in zip(rows, handles, strict=True):
        tokens = handle.result().sequences[0].tokens
        text = tokenizer.decode(tokens, skip_special_tokens=True).strip()
        yield _Answer(row, text, score(reward, row, text), len(tokens))


def _scored(
    sampler: SamplingClient, tokenizer: ChatTokenizer, rows: Sequence[Row], config: EvalConfig
) -> Iterator[_Answer]:
    examples = [encode_row(tokenizer, row, config) for row in rows]
    handles = [sampler.compute_logprobs(ModelInput.from_ints(example.tokens)) for example in examples]
    for row, example, handle in zip(rows, examples, handles, strict=True):
        logprobs = np.array(handle.result()[1:], np.float64)[example.weights[1:] > 0]
        yield _Answer(row, "", float(-logprobs.mean()), len(logprobs))


def _require_response(row: Row, config: EvalConfig) -> None:
    messages = messages_of(row, config)
    if not messages or messages[-1]["role"] != "assistant":
        raise row.error("there is no response to compare with")


def _value(answers: Sequence[_Answer], config: EvalConfig) -> float:
    if config.metric != "perplexity":
        return fmean(answer.worth for answer in answers)
    return math.exp(fmean((a.worth for a in answers), weights=[a.num_tokens for a in answers]))


def _write(path: Path, answers: Sequence[_Answer]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = ({"where": a.row.where, "answer": a.text, "score": a.worth, "tokens": a.num_tokens} for a in answers)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
