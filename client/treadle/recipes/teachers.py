"""What another model thinks of samples: log-probabilities of their tokens, and what it would rather have drawn.

Knows a sampling client and samples; nothing of what is learned from the answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from treadle.recipes.rollouts import Floats, Prompt
from treadle.sampling import SamplingClient
from treadle.types import Datum, ModelInput, SampledSequence, SamplingParams, TensorData

Sample = tuple[Prompt, SampledSequence]


@dataclass(frozen=True)
class Scores:
    """Of the n tokens of a sample: `logprobs` float32 [n]; `tokens` int32 [n, k], the likeliest; `weights` [n, k].

    `weights` are the probabilities of `tokens`, scaled to a sum of 1 at each position; k may be 0.
    """

    logprobs: Floats
    tokens: NDArray[np.int32]
    weights: Floats


def ask_teacher(teacher: SamplingClient, samples: Sequence[Sample], top_k: int = 0) -> list[Scores]:
    """Returns what a model thinks of each sample's tokens, all asked for at once."""
    handles = [
        teacher.sample(
            ModelInput.from_ints([*prompt.tokens, *one.tokens]),
            sampling_params=SamplingParams(max_tokens=1, temperature=0.0),
            include_prompt_logprobs=True,
            topk_prompt_logprobs=top_k,
            prompt_logprobs_last_n=len(one.tokens),
        )
        for prompt, one in samples
    ]
    scores = []
    for (_, one), handle in zip(samples, handles, strict=True):
        answer = handle.result()
        size = len(one.tokens)
        logprobs = np.array((answer.prompt_logprobs or [])[-size:], np.float32)
        tokens, weights = np.zeros((size, 0), np.int32), np.zeros((size, 0), np.float32)
        if answer.topk_prompt_logprobs is not None:
            tokens = answer.topk_prompt_logprobs.tokens[-size:]
            weights = np.exp(answer.topk_prompt_logprobs.logprobs[-size:])
            weights = weights / weights.sum(axis=1, keepdims=True)
        scores.append(Scores(logprobs, tokens, weights))
    return scores


def taught_datum(prompt: Prompt, sample: SampledSequence, scores: Scores, scale: float) -> Datum:
    """Returns a cross_entropy datum with the teacher's k likeliest tokens as the targets of each position."""
    tokens = np.array([*prompt.tokens, *sample.tokens], np.int32)
    before = len(prompt.tokens) - 1
    targets = np.full((len(tokens) - 1, scores.tokens.shape[1]), -1, np.int32)
    weights = np.zeros(targets.shape, np.float32)
    targets[before:], weights[before:] = scores.tokens, scores.weights * np.float32(scale)
    inputs = {"target_tokens": TensorData.from_numpy(targets), "weights": TensorData.from_numpy(weights)}
    return Datum(ModelInput.from_ints(tokens[:-1]), inputs)
