"""Samples to learn from: each step's prompts, drawn from the newest weights or from those of one step before.

Seeds follow from step and prompt, and no samples are drawn ahead over a checkpoint, so that a resumed recipe draws the
same. Knows nothing of rewards and losses.
"""

import hashlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from treadle.errors import BadInputError
from treadle.futures import Handle
from treadle.recipes import batches
from treadle.recipes.chat import ChatTokenizer
from treadle.recipes.configs import SamplingConfig
from treadle.recipes.examples import encode_prompt, prompt_of
from treadle.recipes.rows import Row, read_rows
from treadle.records import SupportedModel
from treadle.sampling import SamplingClient
from treadle.types import Datum, ModelInput, SampledSequence, SampleResponse, SamplingParams, TensorData

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Prompt:
    """What is asked: the row that it is from, its last message, its tokens."""

    row: Row
    text: str
    tokens: list[int]


@dataclass(frozen=True)
class Group:
    """A prompt and its samples."""

    prompt: Prompt
    sequences: Sequence[SampledSequence]
    texts: Sequence[str]
    """Of the samples, without special tokens and surrounding space."""


def encode_prompts(
    tokenizer: ChatTokenizer, rows: Sequence[Row], config: SamplingConfig, model: SupportedModel
) -> list[Prompt]:
    """Returns the prompts of rows; raises DataError, also for those that leave no room for a sample."""
    prompts = []
    limits = (config.max_length, model.max_context_length, model.max_tokens_per_pass)
    # One more for the token that a teacher is asked for behind a sample.
    room = min(limit for limit in limits if limit) - config.max_tokens - 1
    for row in rows:
        messages = prompt_of(row, config)
        tokens = encode_prompt(tokenizer, messages, config)
        if len(tokens) > room:
            raise row.error(f"the prompt has {len(tokens)} tokens; with max_tokens {config.max_tokens} {room} fit")
        prompts.append(Prompt(row, messages[-1]["content"], tokens))
    return prompts


def read_prompts(
    tokenizer: ChatTokenizer, config: SamplingConfig, model: SupportedModel
) -> tuple[list[Prompt], list[Prompt]]:
    """Returns the prompts to train on and those to evaluate on; raises DataError."""
    prompts = encode_prompts(tokenizer, read_rows(config), config, model)
    held_out = read_rows(config, config.eval_data) if config.eval_data else []
    return prompts, encode_prompts(tokenizer, held_out, config, model)


def digest_of(prompts: Sequence[Prompt]) -> str:
    """Returns a sha256 over all prompts."""
    seen = hashlib.sha256()
    for prompt in prompts:
        seen.update(np.array(prompt.tokens, np.int32).tobytes() + b"\xff" * 4)
    return seen.hexdigest()[:16]


class Rollouts:
    """Draws the samples of every step."""

    def __init__(
        self, tokenizer: ChatTokenizer, prompts: Sequence[Prompt], config: SamplingConfig, sampler: SamplingClient
    ) -> None:
        self._tokenizer, self._prompts, self._config = tokenizer, prompts, config
        self._steps = batches.batches_of(
            len(prompts), config.prompts_per_step, epochs=1, steps=config.steps, seed=config.seed
        )
        self._asked: deque[tuple[list[Prompt], list[Handle[SampleResponse]]]] = deque()
        self.sampler = sampler
        """Of the newest weights; the recipe sets it when it has published."""

    def ask(self, step: int) -> None:
        """Asks for the samples of a step, and of the next one if they may be one step old."""
        horizon = step + 1 + self._config.one_step_off
        if self._config.checkpoint_every:
            # A step that a resume may begin with draws from the weights of its checkpoint.
            every = self._config.checkpoint_every
            horizon = min(horizon, (step // every + 1) * every)
        for coming in range(step + len(self._asked), min(horizon, self._config.steps)):
            prompts = [self._prompts[index] for index in self._steps[coming]]
            self._asked.append((prompts, _ask(self.sampler, prompts, self._config, coming)))

    def next(self) -> list[Group]:
        """Waits for the samples that were asked for first."""
        prompts, handles = self._asked.popleft()
        return self._groups(prompts, handles)

    def draw(self, prompts: Sequence[Prompt]) -> list[Group]:
        """Draws a group for each of other prompts from the newest weights, always with the same seeds."""
        return self._groups(prompts, _ask(self.sampler, prompts, self._config, self._config.steps))

    def _groups(self, prompts: Sequence[Prompt], handles: Sequence[Handle[SampleResponse]]) -> list[Group]:
        groups = []
        for prompt, handle in zip(prompts, handles, strict=True):
            drawn = handle.result().sequences
            texts = [self._tokenizer.decode(one.tokens, skip_special_tokens=True).strip() for one in drawn]
            groups.append(Group(prompt, drawn, texts))
        return groups


def _ask(
    sampler: SamplingClient, prompts: Sequence[Prompt], config: SamplingConfig, step: int
) -> list[Handle[SampleResponse]]:
    """Asks for a group per prompt, with seeds of this step."""
    handles = []
    for index, prompt in enumerate(prompts):
        seed = (config.seed << 44) + (step << 20) + index
        params = SamplingParams(max_tokens=config.max_tokens, temperature=config.temperature, seed=seed % 2**63)
        handles.append(sampler.sample(ModelInput.from_ints(prompt.tokens), config.group_size, params))
    return handles


def policy_datum(prompt: Prompt, sequence: SampledSequence, advantages: Floats) -> Datum:
    """Returns a policy-gradient datum with an advantage per token of the sample."""
    tokens = np.array([*prompt.tokens, *sequence.tokens], np.int32)
    before = len(prompt.tokens) - 1
    inputs = {"target_tokens": TensorData.from_numpy(tokens[1:])}
    for name, values in (("logprobs", sequence.logprobs), ("advantages", advantages)):
        column = np.zeros(len(tokens) - 1, np.float32)
        column[before:] = values
        inputs[name] = TensorData.from_numpy(column)
    return Datum(ModelInput.from_ints(tokens[:-1]), inputs)


def mean_kl(policy: Sequence[Floats], other: Sequence[Floats]) -> float:
    """Returns the mean divergence per token, in nats, of a policy from another, estimated from its own samples.

    The estimate is k3 of Schulman 2020, http://joschu.net/blog/kl-approx.html: never negative, without bias.
    """
    log_ratio = np.concatenate(other) - np.concatenate(policy)
    return float(np.mean(np.expm1(log_ratio) - log_ratio))


def check_sampling(config: SamplingConfig) -> None:
    """Raises BadInputError for settings that cannot work."""
    if config.group_size < 1 or config.prompts_per_step < 1 or config.steps < 1:
        raise BadInputError("steps, prompts_per_step and group_size must be at least 1")
