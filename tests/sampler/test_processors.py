"""Bias, penalties, cuts and tables of log-probs, compared with transformers' processors and closed formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LogitsProcessorList
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tests.sampler.conftest import make_prompt
from tests.sampler.driving import Outcome, collect, run
from treadle_engine.decode import Decoder
from treadle_engine.decode_base import DecodeBase
from treadle_engine.decode_requests import DecodeEvent, PromptEvent, SampleRequest, TokenEvent
from treadle_engine.errors import EngineError
from treadle_engine.lora import AdapterWeights
from treadle_engine.sampling import TokenHistory, draw, sample_stream
from treadle_engine.sampling_params import SamplingParams

_PROMPT = [3, 7, 7, 11]
_DRAWN = [5, 7, 5]


def logits_of(vocabulary: int, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    """Return a row of logits without equal values."""
    return torch.randn(1, vocabulary, generator=torch.Generator().manual_seed(seed)) * spread


def history() -> TokenHistory:
    """Return the history of a text with a prompt and three drawn tokens."""
    made = TokenHistory(np.array(_PROMPT, dtype=np.int32))
    for token in _DRAWN:
        made.add(token)
    return made


@pytest.mark.parametrize(
    ("params", "theirs"),
    [
        (SamplingParams(top_k=5), [TopKLogitsWarper(5)]),
        (SamplingParams(top_k=3000), [TopKLogitsWarper(3000)]),
        (SamplingParams(top_p=0.6), [TopPLogitsWarper(0.6)]),
        (SamplingParams(min_p=0.05), [MinPLogitsWarper(0.05)]),
        (SamplingParams(temperature=0.7, top_k=40, top_p=0.8, min_p=0.02),
         [TemperatureLogitsWarper(0.7), TopKLogitsWarper(40), TopPLogitsWarper(0.8), MinPLogitsWarper(0.02)]),
        (SamplingParams(temperature=60.0, top_p=0.9), [TemperatureLogitsWarper(60.0), TopPLogitsWarper(0.9)]),
        (SamplingParams(temperature=60.0, min_p=0.9), [TemperatureLogitsWarper(60.0), MinPLogitsWarper(0.9)]),
        (SamplingParams(repetition_penalty=1.7, top_k=4), [RepetitionPenaltyLogitsProcessor(1.7), TopKLogitsWarper(4)]),
        (SamplingParams(logit_bias=((5, 4.0), (9, -4.0)), top_k=4),
         [SequenceBiasLogitsProcessor({(5,): 4.0, (9,): -4.0}), TopKLogitsWarper(4)]),
    ],
)  # fmt: skip
def test_the_distribution_is_that_of_transformers(params: SamplingParams, theirs: list[object]) -> None:
    """Quantiles of the drawn tokens' distribution hit exactly the tokens that transformers keeps, as often."""
    logits_1V = logits_of(4096)
    ids = torch.tensor([_PROMPT + _DRAWN])
    expected_V = torch.softmax(LogitsProcessorList(theirs)(ids, logits_1V.clone())[0].double(), dim=-1).numpy()
    uniforms = ((np.arange(2000) + 0.5) / 2000).tolist()
    tokens, _, _ = draw(logits_1V.expand(2000, -1), [params] * 2000, uniforms, [history()] * 2000)
    found_V = np.bincount(tokens, minlength=4096) / 2000
    assert not found_V[expected_V == 0].any()
    np.testing.assert_allclose(found_V, expected_V, atol=1.01e-3)


def test_log_probs_are_those_after_bias_penalties_and_temperature() -> None:
    """Presence and frequency count what was drawn, repetition the prompt too; the cuts change no log-prob."""
    logits_1V = logits_of(32)
    params = SamplingParams(
        temperature=0.5, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.25,
        logit_bias=((1, 2.0),), top_k=2,
    )  # fmt: skip
    expected_V = logits_1V[0].double().clone()
    expected_V[1] += 2.0
    for token in {*_PROMPT, *_DRAWN}:
        expected_V[token] *= 1.3 if expected_V[token] < 0 else 1 / 1.3
    expected_V[5] -= 0.5 + 2 * 0.25
    expected_V[7] -= 0.5 + 0.25
    drawn = draw(logits_1V, [params], [0.3], [history()])
    np.testing.assert_allclose(drawn.tempered_NV[0].log_softmax(-1), torch.log_softmax(expected_V / 0.5, -1), atol=1e-4)


def test_a_rows_draw_does_not_depend_on_the_other_rows() -> None:
    """Every way of drawing gives the same token and log-prob alone and among all others."""
    ways = [
        SamplingParams(),
        SamplingParams(top_k=7),
        SamplingParams(top_p=0.7),
        SamplingParams(min_p=0.1, temperature=2.0),
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=90.0, top_p=0.95),
        SamplingParams(frequency_penalty=1.0),
    ]
    for vocabulary in (1024, 4099):
        rows_NV = torch.cat([logits_of(vocabulary, seed) for seed in range(28)])
        params = [ways[row % len(ways)] for row in range(28)]
        uniforms = [sample_stream(3, row).random() for row in range(28)]
        all_drawn = draw(rows_NV, params, uniforms, [history()] * 28)
        for row in range(28):
            alone = draw(rows_NV[row : row + 1], [params[row]], [uniforms[row]], [history()])
            assert alone.tokens == [all_drawn.tokens[row]]
            assert alone.logprobs == [all_drawn.logprobs[row]]


def events_of(decoder: Decoder, request: SampleRequest) -> list[DecodeEvent]:
    """Run one request and return its events."""
    decoder.add(request)
    events: list[DecodeEvent] = []
    while decoder.has_work:
        events += decoder.step()
    return events


def test_tables_of_a_prompt(base: DecodeBase, adapters: list[AdapterWeights]) -> None:
    """Likeliest tokens and given tokens at every position are what the whole distribution says; -1 asks for nothing."""
    prompt = make_prompt(70)
    everything = SampleRequest(prompt, weights=adapters[0], num_samples=0, prompt_top=1024)
    (event,) = events_of(Decoder(base), everything)
    assert isinstance(event, PromptEvent)
    assert event.top is not None
    table_TV = np.full((70, 1024), np.nan, dtype=np.float32)
    np.put_along_axis(table_TV[1:], event.top.ids[1:].astype(np.int64), event.top.logprobs[1:], axis=1)
    np.testing.assert_allclose(np.exp(table_TV[1:].astype(np.float64)).sum(axis=1), 1.0, atol=1e-5)
    assert event.logprobs_T[1:].tolist() == table_TV[np.arange(1, 70), prompt[1:]].tolist()
    targets_TK = np.stack([np.roll(prompt, 3), np.full(70, -1), np.arange(70)], axis=1).astype(np.int32)
    request = SampleRequest(prompt, SamplingParams(max_tokens=1), adapters[0], prompt_top=30, targets_TK=targets_TK)
    first, _ = events_of(Decoder(base), request)
    assert isinstance(first, PromptEvent)
    assert first.top is not None
    assert first.targets_TK is not None
    assert first.top.ids[1:].tolist() == event.top.ids[1:, :30].tolist()
    assert (first.top.ids[0] == -1).all()
    assert np.isnan(first.targets_TK[0]).all()
    assert np.isnan(first.targets_TK[:, 1]).all()
    assert first.targets_TK[1:, 0].tolist() == table_TV[np.arange(1, 70), targets_TK[1:, 0]].tolist()


def test_tables_of_samples(base: DecodeBase) -> None:
    """The likeliest tokens at a drawn position belong to the distribution that the token's log-prob is of."""
    params = SamplingParams(max_tokens=6, seed=2, temperature=0.8, top_k=3, ignore_eos=True)
    for event in events_of(Decoder(base), SampleRequest(make_prompt(20), params, num_samples=2, num_top=1024)):
        if isinstance(event, TokenEvent):
            assert event.top is not None
            place = event.top.ids[0].tolist().index(event.token)
            assert place < 3
            assert event.top.logprobs[0, place] == np.float32(event.logprob)


def test_the_last_positions_alone_need_no_second_reading(base: DecodeBase) -> None:
    """With `last_n`, a prompt whose beginning is known is read from there on, and earlier entries are NaN."""
    decoder = Decoder(base)
    prompt = make_prompt(200)
    run(decoder, [SampleRequest(prompt, SamplingParams(max_tokens=1))])
    fresh, found = (run(one, [SampleRequest(prompt, num_samples=0, last_n=20)])[0] for one in (Decoder(base), decoder))
    (whole,) = run(Decoder(base), [SampleRequest(prompt, num_samples=0)])
    assert found.num_cached == 128
    assert fresh.prompt_logprobs_T is not None
    assert found.prompt_logprobs_T is not None
    assert whole.prompt_logprobs_T is not None
    assert np.isnan(found.prompt_logprobs_T[:180]).all()
    assert fresh.prompt_logprobs_T.tobytes() == found.prompt_logprobs_T.tobytes()
    np.testing.assert_allclose(found.prompt_logprobs_T[180:], whole.prompt_logprobs_T[180:], atol=2e-5)


def test_penalties_follow_the_text_through_a_pause(base: DecodeBase) -> None:
    """A penalised sample draws the same tokens when memory is tight, and does not repeat itself."""
    params = SamplingParams(max_tokens=150, seed=1, presence_penalty=9.0, ignore_eos=True)
    requests = [SampleRequest(make_prompt(60, place), params) for place in range(10)]
    roomy, tight = Decoder(base), Decoder(base, max_cache_tokens=1)
    expected, found = run(roomy, requests), run(tight, requests)
    assert tight.num_preemptions > 0
    assert [one.tokens for one in found] == [one.tokens for one in expected]
    assert all(len(set(one.tokens[0])) > 145 for one in found)


@pytest.mark.parametrize(
    "request_",
    [
        SampleRequest(make_prompt(4), SamplingParams(min_p=1.5)),
        SampleRequest(make_prompt(4), SamplingParams(repetition_penalty=0.0)),
        SampleRequest(make_prompt(4), SamplingParams(presence_penalty=float("nan"))),
        SampleRequest(make_prompt(4), SamplingParams(frequency_penalty=11.0)),
        SampleRequest(make_prompt(4), SamplingParams(logit_bias=((1, 101.0),))),
        SampleRequest(make_prompt(4), SamplingParams(logit_bias=((1, 1.0), (1, 2.0)))),
        SampleRequest(make_prompt(4), SamplingParams(logit_bias=((5000, 1.0),))),
        SampleRequest(make_prompt(4), num_top=1025),
        SampleRequest(make_prompt(4), prompt_top=-1),
        SampleRequest(make_prompt(4), targets_TK=np.zeros((3, 1), dtype=np.int32)),
        SampleRequest(make_prompt(4), targets_TK=np.full((4, 1), 1024, dtype=np.int32)),
    ],
)
def test_what_cannot_be_is_refused(base: DecodeBase, request_: SampleRequest) -> None:
    """Every value out of its range is refused before it costs anything."""
    decoder = Decoder(base)
    with pytest.raises(EngineError) as caught:
        decoder.add(request_)
    assert caught.value.reason in {"BAD_SAMPLING_PARAMS", "TOKEN_OUT_OF_RANGE"}
    assert not decoder.has_work


def test_cancelling_frees_at_every_stage(base: DecodeBase) -> None:
    """Waiting, reading, drawing, paused and read again: a cancelled request leaves nothing behind."""
    for steps in range(0, 60, 3):
        decoder = Decoder(base, max_sequences=6, max_cache_tokens=1)
        params = SamplingParams(max_tokens=200, seed=1, ignore_eos=True)
        numbers = [
            decoder.add(SampleRequest(make_prompt(100, place), params, num_samples=2, owner=str(place)))
            for place in range(5)
        ]
        outcomes: dict[int, Outcome] = {}
        for _ in range(steps):
            collect(outcomes, decoder.step())
        for number in numbers:
            decoder.cancel(number)
        assert not decoder.has_work
        decoder.forget_prefixes()
        assert (decoder.num_active, decoder.num_waiting, decoder.num_cache_bytes) == (0, 0, 0)
