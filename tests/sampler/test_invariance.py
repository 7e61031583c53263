"""Your numbers are yours: samples and log-probs do not change with the company, compared bit by bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.sampler.conftest import make_prompt, take_kernels_away
from tests.sampler.driving import Outcome, run
from treadle_engine.bases import pip_folder
from treadle_engine.decode import Decoder
from treadle_engine.decode_base import DecodeBase
from treadle_engine.decode_requests import SampleRequest
from treadle_engine.lora import AdapterWeights, LoraConfig
from treadle_engine.sampling_params import SamplingParams


def requests_of(adapters: list[AdapterWeights]) -> list[SampleRequest]:
    """Return a mixed lot: base and adapters, lengths across capacities, every way of drawing."""
    ways = [
        SamplingParams(max_tokens=12, seed=1, ignore_eos=True),
        SamplingParams(max_tokens=25, seed=2, temperature=0.7, ignore_eos=True),
        SamplingParams(max_tokens=10, seed=3, top_k=20, ignore_eos=True),
        SamplingParams(max_tokens=15, seed=4, top_p=0.8, temperature=1.3, ignore_eos=True),
        SamplingParams(max_tokens=20, temperature=0.0),
    ]
    lengths = [1, 9, 15, 33, 55, 64, 150]
    return [
        SampleRequest(
            make_prompt(length, place), ways[place % 5], [None, *adapters][place % 5], 1 + place % 3, place % 2 == 0
        )
        for place, length in enumerate(lengths)
    ]


def assert_same_bits(left: Outcome, right: Outcome) -> None:
    """Compare everything exactly."""
    assert left.tokens == right.tokens
    assert left.logprobs == right.logprobs
    assert left.stops == right.stops
    if left.prompt_logprobs_T is not None and right.prompt_logprobs_T is not None:
        assert left.prompt_logprobs_T.tobytes() == right.prompt_logprobs_T.tobytes()


@pytest.mark.parametrize(
    ("dtype", "quantize", "kernels"),
    [
        ("float32", "none", True),
        ("bfloat16", "none", True),
        ("float32", "int8", True),
        ("float32", "nf4", True),
        ("float32", "none", False),
        ("bfloat16", "none", False),
    ],
)
def test_company_changes_no_bit(dtype: str, quantize: str, kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each request alone, all at once, and joining at odd moments in another order: the same bits.

    Without kernels: as on a machine that does not have their instructions.
    """
    if not kernels:
        take_kernels_away(monkeypatch)
    base = DecodeBase.load(str(pip_folder()), dtype=dtype, quantize=quantize)
    base.prepack()
    adapters = []
    for seed, rank in ((1, 8), (2, 3), (3, 16), (4, 1)):
        weights = AdapterWeights.init(base, LoraConfig(rank=rank, seed=seed))
        weights.flat.add_(torch.randn(weights.flat.shape, generator=torch.Generator().manual_seed(seed)), alpha=0.02)
        weights.refresh()
        adapters.append(weights)
    requests = requests_of(adapters)
    alone = [run(Decoder(base), [request])[0] for request in requests]
    together = run(Decoder(base), requests)
    late = run(Decoder(base, max_sequences=7), requests[::-1], joins=[0, 3, 11, 4, 12, 1, 0])[::-1]
    for one, two, three in zip(alone, together, late, strict=True):
        assert_same_bits(one, two)
        assert_same_bits(one, three)


def test_many_rows_of_one_adapter_change_no_bit(base: DecodeBase, adapters: list[AdapterWeights]) -> None:
    """A sample is the same as one of 40 rows of its adapter and as the only one."""
    params = SamplingParams(max_tokens=12, seed=5, ignore_eos=True)
    request = SampleRequest(make_prompt(20), params, adapters[0])
    crowd = [SampleRequest(make_prompt(length, 7), params, adapters[0]) for length in range(10, 49)]
    (alone,) = run(Decoder(base), [request])
    assert_same_bits(alone, run(Decoder(base), [*crowd, request])[-1])


def test_a_group_is_its_samples_one_by_one(base: DecodeBase) -> None:
    """Sample i of a group of 6 equals sample i of a larger group: the prompt is read once, the draws are its own."""
    params = SamplingParams(max_tokens=15, seed=11, ignore_eos=True)
    (six,) = run(Decoder(base), [SampleRequest(make_prompt(31), params, num_samples=6)])
    (nine,) = run(Decoder(base, max_sequences=4), [SampleRequest(make_prompt(31), params, num_samples=9)])
    assert {index: nine.tokens[index] for index in range(6)} == six.tokens
    assert {index: nine.logprobs[index] for index in range(6)} == six.logprobs
    assert len({tuple(tokens) for tokens in nine.tokens.values()}) == 9


def test_a_poisoned_adapter_fails_alone(base: DecodeBase, adapters: list[AdapterWeights]) -> None:
    """Weights that are not finite end their own request and leave no trace in the cache for the next one."""
    poisoned = AdapterWeights.init(base, LoraConfig(rank=4))
    poisoned.flat.fill_(float("inf"))
    poisoned.refresh()
    params = SamplingParams(max_tokens=12, seed=1, ignore_eos=True)
    good = [SampleRequest(make_prompt(20, place), params, adapters[place]) for place in range(3)]
    bad = [SampleRequest(make_prompt(20, place), params, poisoned, num_samples=2) for place in range(3)]
    expected = run(Decoder(base), good)
    decoder = Decoder(base)
    outcomes = run(decoder, [*bad, *good])
    assert [outcome.error for outcome in outcomes[:3]] == ["NAN_LOGITS"] * 3
    for one, two, three in zip(expected, outcomes[3:], run(decoder, good), strict=True):
        assert_same_bits(one, two)
        assert_same_bits(one, three)


def test_an_adapter_that_breaks_midway_is_wiped(base: DecodeBase) -> None:
    """A sequence that turns NaN while it decodes frees a slot whose next user sees nothing of it."""
    weights = AdapterWeights.init(base, LoraConfig(rank=4))
    params = SamplingParams(max_tokens=60, seed=1, ignore_eos=True)
    clean = SampleRequest(make_prompt(12), params)
    (expected,) = run(Decoder(base), [clean])
    decoder = Decoder(base)
    decoder.add(SampleRequest(make_prompt(30), params, weights))
    for _ in range(5):
        decoder.step()
    weights.flat.fill_(float("nan"))
    weights.refresh()
    keeper = decoder.add(SampleRequest(make_prompt(8), params))
    while decoder.num_active > 1 or decoder.num_waiting:
        decoder.step()
    decoder.cancel(keeper)
    assert_same_bits(expected, run(decoder, [clean])[0])
    assert np.isfinite(list(expected.logprobs[0])).all()
