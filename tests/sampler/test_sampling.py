"""How tokens are drawn and when samples end, on the decoder without the service."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.sampler.conftest import make_prompt
from tests.sampler.driving import run
from treadle_engine.decode import Decoder
from treadle_engine.decode_base import DecodeBase
from treadle_engine.decode_requests import SampleRequest
from treadle_engine.errors import EngineError
from treadle_engine.sampling import draw, sample_stream
from treadle_engine.sampling_params import SamplingParams
from treadle_engine.stops import Detokenize, StopRule

PROBABILITIES = torch.tensor([0.05, 0.4, 0.25, 0.1, 0.2])


def frequencies(params: SamplingParams, count: int = 4000) -> np.ndarray:
    """Return how often each of five tokens is drawn by `count` independent samples."""
    uniforms = [sample_stream(7, index).random() for index in range(count)]
    tokens, _, _ = draw(PROBABILITIES.log().expand(count, 5), [params] * count, uniforms)
    return np.bincount(tokens, minlength=5) / count


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (SamplingParams(), [0.05, 0.4, 0.25, 0.1, 0.2]),
        (SamplingParams(temperature=0.5), np.square([0.05, 0.4, 0.25, 0.1, 0.2]) / 0.275),
        (SamplingParams(top_k=2), [0, 0.4 / 0.65, 0.25 / 0.65, 0, 0]),
        (SamplingParams(top_k=-1), [0.05, 0.4, 0.25, 0.1, 0.2]),
        (SamplingParams(top_k=100), [0.05, 0.4, 0.25, 0.1, 0.2]),
        (SamplingParams(top_p=0.7), [0, 0.4 / 0.85, 0.25 / 0.85, 0, 0.2 / 0.85]),
        (SamplingParams(top_p=0.01), [0, 1, 0, 0, 0]),
        (SamplingParams(top_k=3, top_p=0.5), [0, 0.4 / 0.65, 0.25 / 0.65, 0, 0]),
        (SamplingParams(temperature=0.0), [0, 1, 0, 0, 0]),
        (SamplingParams(temperature=1e-30), [0, 1, 0, 0, 0]),
    ],
)
def test_tokens_follow_the_distribution(params: SamplingParams, expected: list[float]) -> None:
    """Frequencies of 4000 draws are within five standard deviations; cut tokens never come."""
    found = frequencies(params)
    np.testing.assert_allclose(found, expected, atol=0.04)
    assert not found[np.asarray(expected) == 0].any()


def test_logprobs_are_tempered_and_uncut() -> None:
    """Top-k and top-p leave log-probs alone, temperature does not; greedy answers temperature 1."""
    logits_NV = PROBABILITIES.log().expand(3, 5)
    params = [SamplingParams(top_k=1), SamplingParams(temperature=0.5, top_p=0.1), SamplingParams(temperature=0.0)]
    tokens, logprobs, _ = draw(logits_NV, params, [0.5] * 3)
    assert tokens == [1, 1, 1]
    np.testing.assert_allclose(np.exp(logprobs), [0.4, 0.16 / 0.275, 0.4], rtol=1e-5)


def test_seeds_and_indices_name_streams() -> None:
    """The same seed and index give the same numbers, another seed or index others."""
    streams = {
        (seed, index): sample_stream(seed, index).random(4).tolist() for seed in (0, 1, 2**64 - 1) for index in range(3)
    }
    assert sample_stream(1, 2).random(4).tolist() == streams[1, 2]
    assert len({tuple(values) for values in streams.values()}) == 9


def test_a_stop_token_is_kept_once(base: DecodeBase) -> None:
    """A sample ends with its first stop token; what came before does not change."""
    free = SamplingParams(max_tokens=40, seed=3, ignore_eos=True)
    (long,) = run(Decoder(base), [SampleRequest(make_prompt(10), free)])
    tokens = long.tokens[0]
    stop = tokens[12]
    (short,) = run(
        Decoder(base),
        [SampleRequest(make_prompt(10), SamplingParams(max_tokens=40, seed=3, ignore_eos=True, stop_tokens=(stop,)))],
    )
    assert short.tokens[0] == tokens[: tokens.index(stop) + 1]
    assert short.stops == {0: "stop"}
    assert long.stops == {0: "length"}
    assert len(tokens) == 40


def test_end_of_sequence_ends_a_sample_unless_ignored(base: DecodeBase) -> None:
    """The base's own end token is a stop token, kept as the last."""
    prompt = make_prompt(23)
    params = [SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=ignored) for ignored in (False, True)]
    ended, ignored = run(Decoder(base), [SampleRequest(prompt, one) for one in params])
    assert ended.tokens[0].count(2) == 1
    assert ended.tokens[0][-1] == 2
    assert ended.stops == {0: "stop"}
    assert len(ignored.tokens[0]) == 40


def test_a_stop_string_is_found_across_tokens(base: DecodeBase, detokenize: Detokenize) -> None:
    """The sample ends with the token that completes the string, wherever token borders lie."""
    free = SamplingParams(max_tokens=60, seed=5, ignore_eos=True)
    (long,) = run(Decoder(base), [SampleRequest(make_prompt(10), free)])
    tokens = long.tokens[0]
    text = detokenize(tokens)
    stop = next(text[at : at + 5] for at in range(20, len(text)) if "\ufffd" not in text[at : at + 5])
    first = next(count for count in range(1, 61) if stop in detokenize(tokens[:count]))
    params = SamplingParams(max_tokens=60, seed=5, ignore_eos=True, stop_strings=("never this", stop))
    (short,) = run(Decoder(base, detokenize), [SampleRequest(make_prompt(10), params)])
    assert short.tokens[0] == tokens[:first]
    assert short.stops == {0: "stop"}


def test_stop_strings_of_many_bytes_are_seen_byte_by_byte(detokenize: Detokenize) -> None:
    """A character that takes several tokens is recognised when its last byte is there."""
    from transformers import AutoTokenizer

    from treadle_engine.bases import pip_folder

    tokens = AutoTokenizer.from_pretrained(pip_folder()).encode("so \u2603\U0001f600 it", add_special_tokens=False)
    rule = StopRule(SamplingParams(stop_strings=("\u2603\U0001f600",)), 1000, (), detokenize)
    ends = [rule.check(tokens[: count + 1]) for count in range(len(tokens))]
    first = ends.index("stop")
    assert "\u2603\U0001f600" in detokenize(tokens[: first + 1])
    assert "\u2603\U0001f600" not in detokenize(tokens[:first])


def test_samples_end_with_the_context(base: DecodeBase) -> None:
    """Without max_tokens a sample may fill the context to its last position."""
    length = base.info.max_context - 6
    (outcome,) = run(Decoder(base), [SampleRequest(make_prompt(length), SamplingParams(seed=1, ignore_eos=True))])
    assert len(outcome.tokens[0]) == 6
    assert outcome.stops == {0: "length"}


def test_refusals_name_both_numbers(base: DecodeBase) -> None:
    """Who asks for too much reads how much there is."""
    decoder = Decoder(base)
    with pytest.raises(EngineError, match=r"500 \+ 20 > 512") as caught:
        decoder.add(SampleRequest(make_prompt(500), SamplingParams(max_tokens=20)))
    assert caught.value.reason == "CONTEXT_OVERFLOW"
    assert not decoder.has_work


def test_nobody_waits_behind_a_flood(base: DecodeBase) -> None:
    """An owner with hundreds of samples in line delays another's one sample by a turn, not by all of them."""
    decoder = Decoder(base, max_sequences=4)
    params = SamplingParams(max_tokens=5, seed=1, ignore_eos=True)
    flood = [SampleRequest(make_prompt(5), params, num_samples=50, owner="flood") for _ in range(4)]
    numbers = [decoder.add(request) for request in flood]
    for _ in range(3):
        decoder.step()
    alone = decoder.add(SampleRequest(make_prompt(6), params, owner="alone"))
    order = []
    while decoder.has_work:
        order += [event.request for event in decoder.step() if getattr(event, "stop", None)]
    assert order.index(alone) < 10
    assert order.count(numbers[0]) == 50


def test_everything_is_given_back(base: DecodeBase) -> None:
    """After finished, cancelled and refused requests the decoder is as empty as new."""
    decoder = Decoder(base, max_sequences=5)
    params = SamplingParams(max_tokens=30, seed=1)
    for length in (3, 70, 200):
        run(
            decoder,
            [SampleRequest(make_prompt(length), params, num_samples=7), SampleRequest(make_prompt(4), num_samples=0)],
        )
        numbers = [decoder.add(SampleRequest(make_prompt(length), params, num_samples=4)) for _ in range(4)]
        for number in numbers:
            decoder.step()
            decoder.cancel(number)
            decoder.cancel(number)
    assert not decoder.has_work
    assert decoder.num_active == 0
    assert decoder.num_waiting == 0
    decoder.forget_prefixes()
    assert decoder.num_cache_bytes == 0
