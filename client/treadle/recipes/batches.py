"""Which samples make up each step, and how large the steps are: pure functions of lengths, settings and a seed.

The trainer packs whatever a step holds without padding, and no sample sees another; so to pack here means to give all
steps about as many tokens. Knows no client.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Final

import numpy as np

from treadle.recipes.configs import Schedule

_LARGEST_BATCH: Final = 32
_STEPS_PER_EPOCH: Final = 8
_LARGEST_PACK: Final = 4096
# A line, in logarithms, through two bases at which a learning rate is known to work: 1e-3 for 135 million parameters,
# 6e-3 for 0.87 million; the bounds are those between which LoRA is trained at any size.
_KNOWN_RATE, _KNOWN_SIZE, _SLOPE = 1e-3, 135e6, 0.355
_RATES: Final = (1e-4, 6e-3)


def choose_batch_size(lengths: Sequence[int], token_budget: int) -> int:
    """Returns samples per step: a power of two, at most 32, whose tokens fit the trainer's budget for one pass.

    Few samples get small steps, so that an epoch has at least eight.
    """
    by_tokens = token_budget / max(1.0, float(np.mean(lengths)))
    most = min(_LARGEST_BATCH, by_tokens, len(lengths) / _STEPS_PER_EPOCH)
    return 1 << max(0, int(math.log2(max(1.0, most))))


def choose_pack(lengths: Sequence[int], token_budget: int) -> int:
    """Returns tokens per step when packing: the trainer's budget, at most 4096, at least eight steps an epoch."""
    return max(*lengths, min(token_budget, _LARGEST_PACK, sum(lengths) // _STEPS_PER_EPOCH))


def choose_learning_rate(num_parameters: int, share: float = 1.0) -> float:
    """Returns Adam's peak learning rate for an adapter on a base of this size, with two digits.

    `share` is for methods whose gradients are noisier than those of supervised learning.
    """
    rate = _KNOWN_RATE * (_KNOWN_SIZE / max(1, num_parameters)) ** _SLOPE
    return float(f"{share * min(max(rate, _RATES[0]), _RATES[1]):.1e}")


def learning_rate_at(step: int, steps: int, peak: float, schedule: Schedule, warmup: int) -> float:
    """Returns the learning rate of step 0, 1, ...: up from zero over `warmup` steps, then to a tenth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    share = (step - warmup) / max(1, steps - 1 - warmup)
    if schedule == "constant":
        return peak
    falling = 1.0 - share if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * share))
    return peak * (0.1 + 0.9 * falling)


def batches_of(num_samples: int, batch_size: int, *, epochs: float, steps: int | None, seed: int) -> list[list[int]]:
    """Returns the samples of every step: shuffled epochs one after the other, cut into equal steps."""
    count = steps if steps is not None else max(1, round(num_samples * epochs / batch_size))
    order = _shuffled_epochs(num_samples, seed)
    return [list(islice(order, batch_size)) for _ in range(count)]


def packed_batches(
    lengths: Sequence[int], batch_tokens: int, *, epochs: float, steps: int | None, seed: int
) -> list[list[int]]:
    """Returns the samples of every step: shuffled epochs, cut where the next sample would exceed `batch_tokens`."""
    batches: list[list[int]] = []
    free = 0
    order = _shuffled_epochs(len(lengths), seed)
    for index in order if steps is not None else islice(order, max(1, round(len(lengths) * epochs))):
        if not batches or lengths[index] > free:
            if len(batches) == steps:
                break
            batches.append([])
            free = batch_tokens
        batches[-1].append(index)
        free -= lengths[index]
    return batches


def held_out_of(num_samples: int, fraction: float, seed: int) -> list[int]:
    """Returns which samples are held out, in order: at least one if there are two and `fraction` is not 0."""
    if fraction <= 0 or num_samples < 2:
        return []
    count = min(num_samples - 1, max(1, round(num_samples * fraction)))
    return sorted(np.random.default_rng([seed, 1]).permutation(num_samples)[:count].tolist())


def _shuffled_epochs(size: int, seed: int) -> Iterator[int]:
    generator = np.random.default_rng(seed)
    while True:
        yield from generator.permutation(size).tolist()
