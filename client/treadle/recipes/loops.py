"""The two training loops: supervised fine-tuning with steps queued ahead, and on-policy reinforcement learning.

Knows the SDK and nothing of data files, progress bars or processes; both loops are generators of what each step
showed, so that a caller draws, logs or stops as it likes.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np

from treadle.futures import Handle
from treadle.recipes.chat import ChatTokenizer, policy_datum
from treadle.sampling import SamplingClient
from treadle.training import TrainingClient
from treadle.types import (
    AdamParams,
    Datum,
    ForwardBackwardOutput,
    ModelInput,
    OptimStepResponse,
    SampleResponse,
    SamplingParams,
)

Reward = Callable[[str, str], float]
"""reward(prompt, completion) -> a number."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one optimizer step showed."""

    step: int
    """1 for the first."""
    value: float
    """Mean loss per learned token, or mean reward per sample."""
    num_tokens: int
    """Positions that went through the base for training."""
    seconds: float
    """Time since the step before was reported."""


def linear_decay(peak: float, step: int, steps: int) -> float:
    """Returns a learning rate that falls from `peak` to a tenth of it over `steps`."""
    return peak * (1.0 - 0.9 * step / max(1, steps - 1))


def sft_steps(
    training: TrainingClient,
    data: Sequence[Datum],
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int = 0,
    ahead: int = 2,
) -> Iterator[StepReport]:
    """Fine-tunes on `data` in shuffled batches; `ahead` steps are queued before the first answer is read.

    The queue is what keeps the worker busy while answers travel. Yields one report per step.
    """
    order = _shuffled(len(data), steps * batch_size, seed)
    pending: deque[tuple[list[Datum], Handle[ForwardBackwardOutput]]] = deque()
    mark = time.monotonic()
    for step in range(steps + ahead):
        if step < steps:
            batch = [data[i] for i in order[step * batch_size : (step + 1) * batch_size]]
            pending.append((batch, training.forward_backward(batch, "cross_entropy")))
            adam = AdamParams(learning_rate=linear_decay(learning_rate, step, steps), eps=1e-8)
            training.optim_step(adam)
        if step >= ahead:
            batch, handle = pending.popleft()
            output = handle.result()
            weight = sum(float(datum.loss_fn_inputs["weights"].to_numpy().sum()) for datum in batch)
            now = time.monotonic()
            yield StepReport(step - ahead + 1, output.metrics["loss:sum"] / weight, _num_tokens(batch), now - mark)
            mark = now


def rl_steps(
    training: TrainingClient,
    tokenizer: ChatTokenizer,
    prompts: Callable[[int], Sequence[tuple[str, Sequence[int]]]],
    reward: Reward,
    *,
    steps: int,
    group_size: int,
    params: SamplingParams,
    learning_rate: float,
    ahead: int = 0,
) -> Iterator[StepReport]:
    """Trains on its own samples: publish, sample a group per prompt, score, advantage = reward - group mean, step.

    Args:
        training: the run to train.
        tokenizer: turns samples into the text that is scored.
        prompts: gives step t (0, 1, ...) its prompts as (text, tokens).
        reward: scores (prompt text, completion text).
        steps: optimizer steps.
        group_size: samples per prompt.
        params: how to draw; its seed, if any, is offset by the step.
        learning_rate: Adam's.
        ahead: steps whose samples are drawn before the weights that they train are there: 0 samples each step from the
            newest weights; 1 lets sampler and trainer work at the same time, on samples that are one step old, which
            the loss corrects for by the ratio of the log-probs.
    """
    mark = time.monotonic()
    sampler = training.save_weights_and_get_sampling_client()
    asked: deque[_Asked] = deque()
    stepped: Handle[OptimStepResponse] | None = None
    for step in range(steps):
        for coming in range(step + len(asked), min(step + 1 + ahead, steps)):
            asked.append(_ask_groups(sampler, prompts(coming), group_size, params, coming))
        batch, answers = asked.popleft()
        data, rewards = _scored(batch, [answer.result() for answer in answers], tokenizer, reward)
        before = stepped
        if data:
            training.forward_backward(data, "importance_sampling")
            stepped = training.optim_step(AdamParams(learning_rate=learning_rate, eps=1e-8))
            if step + 1 + len(asked) < steps:
                sampler = training.save_weights_and_get_sampling_client()
        # The step before has an answer by now or soon, and the next is queued behind it: nobody idles for this wait.
        if before is not None:
            before.result()
        now = time.monotonic()
        yield StepReport(step + 1, fmean(rewards), _num_tokens(data), now - mark)
        mark = now
    if stepped is not None:
        stepped.result()


_Asked = tuple[Sequence[tuple[str, Sequence[int]]], list[Handle[SampleResponse]]]
"""Prompts and what was asked for them."""


def _ask_groups(
    sampler: SamplingClient, batch: Sequence[tuple[str, Sequence[int]]], size: int, params: SamplingParams, step: int
) -> _Asked:
    handles: list[Handle[SampleResponse]] = []
    for index, (_, tokens) in enumerate(batch):
        own = params if params.seed is None else replace(params, seed=params.seed + 1000 * step + index)
        handles.append(sampler.sample(ModelInput.from_ints(list(tokens)), size, own))
    return batch, handles


def _scored(
    batch: Sequence[tuple[str, Sequence[int]]],
    answers: Sequence[SampleResponse],
    tokenizer: ChatTokenizer,
    reward: Reward,
) -> tuple[list[Datum], list[float]]:
    """Returns the data to learn from, and all rewards; a group whose rewards are equal teaches nothing."""
    data: list[Datum] = []
    rewards: list[float] = []
    for (text, tokens), answer in zip(batch, answers, strict=True):
        scores = [reward(text, completion_text(tokenizer, s.tokens)) for s in answer.sequences]
        rewards += scores
        mean = fmean(scores)
        data += [
            policy_datum(tokens, s.tokens, s.logprobs, score - mean)
            for s, score in zip(answer.sequences, scores, strict=True)
            if score != mean
        ]
    return data, rewards


def completion_text(tokenizer: ChatTokenizer, tokens: Sequence[int]) -> str:
    """Returns a sample's text without special tokens and surrounding space."""
    return tokenizer.decode(tokens, skip_special_tokens=True).strip()


def _num_tokens(batch: Sequence[Datum]) -> int:
    return sum(datum.model_input.length for datum in batch)


def _shuffled(size: int, count: int, seed: int) -> list[int]:
    generator = np.random.default_rng(seed)
    order: list[int] = []
    while len(order) < count:
        order += generator.permutation(size).tolist()
    return order[:count]
