"""Kept prefixes, lost places and tight memory: none of them changes a bit, and memory stays within its budget."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.sampler.conftest import make_prompt
from tests.sampler.driving import Outcome, collect, run
from tests.sampler.test_invariance import assert_same_bits
from treadle_engine.bases import pip_folder
from treadle_engine.decode import Decoder
from treadle_engine.decode_base import DecodeBase
from treadle_engine.decode_requests import SampleRequest
from treadle_engine.kv_cache import KvCache, capacity_for
from treadle_engine.lora import AdapterWeights, LoraConfig
from treadle_engine.sampling_params import SamplingParams


def free(max_tokens: int, seed: int = 1) -> SamplingParams:
    """Return parameters that draw so many tokens."""
    return SamplingParams(max_tokens=max_tokens, seed=seed, ignore_eos=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_kept_prefix_changes_no_bit(dtype: str) -> None:
    """Turns of a growing chat, with what was drawn in them, are found again and answer what a fresh decoder answers."""
    base = DecodeBase.load(str(pip_folder()), dtype=dtype)
    base.prepack()
    weights = AdapterWeights.init(base, LoraConfig(rank=8, seed=1))
    weights.flat.add_(0.01)
    weights.refresh()
    keeping = Decoder(base)
    text = make_prompt(70)
    for turn in range(4):
        request = SampleRequest(text, free(40, seed=turn), weights)
        (found,) = run(keeping, [request])
        (fresh,) = run(Decoder(base, keep_prefixes=False), [request])
        assert_same_bits(found, fresh)
        assert found.num_cached == (0 if turn == 0 else (len(text) - 24) // 64 * 64)
        text = np.concatenate([text, np.array(found.tokens[0], dtype=np.int32), make_prompt(24, turn)])


def test_memory_of_finished_samples_serves_the_next(base: DecodeBase) -> None:
    """Buffers are kept when a slab empties, for slabs of any capacity, within the budget; and given back on request."""
    decoder = Decoder(base, max_cache_tokens=1, keep_prefixes=False)
    per_position = 2 * base.info.num_layers * base.info.num_kv_heads * base.info.head_dim * base.dtype.itemsize
    held = []
    for length in (100, 100, 40, 200, 100):
        run(decoder, [SampleRequest(make_prompt(length, seed), free(30, seed)) for seed in range(6)])
        held.append(decoder.num_cache_bytes)
        assert decoder.cache_counts.num_positions == 0
        assert 0 < held[-1] <= decoder.cache_counts.max_positions * per_position
    assert held[1] == held[0]
    decoder.forget_prefixes()
    assert decoder.num_cache_bytes == 0


def test_memory_may_be_ready_before_the_first_sample(base: DecodeBase) -> None:
    """What `prepare` takes is within an eighth of the budget, is used, and changes no bit."""
    fresh, ready = Decoder(base), Decoder(base)
    ready.prepare()
    counts = ready.cache_counts
    per_position = 2 * base.info.num_layers * base.info.num_kv_heads * base.info.head_dim * base.dtype.itemsize
    prepared = ready.num_cache_bytes
    assert counts.num_positions == 0
    assert 0 < prepared <= counts.max_positions * per_position // 8
    requests = [SampleRequest(make_prompt(60, seed), free(70, seed)) for seed in range(5)]
    for found, expected in zip(run(ready, requests), run(fresh, requests), strict=True):
        assert_same_bits(found, expected)


def test_adapters_do_not_share_prefixes(base: DecodeBase, adapters: list[AdapterWeights]) -> None:
    """The same text under another adapter, or the same one after a change, is another text."""
    decoder = Decoder(base)
    request = [SampleRequest(make_prompt(130), free(2), weights) for weights in (adapters[0], adapters[1], None)]
    assert [run(decoder, [one])[0].num_cached for one in (*request, *request)] == [0, 0, 0, 128, 128, 128]
    adapters[1].flat.mul_(1.0)
    assert run(decoder, [request[1]])[0].num_cached == 0


def test_equal_prompts_that_arrive_together_are_read_once(base: DecodeBase) -> None:
    """Sixteen requests with one prompt read its whole blocks once."""
    decoder = Decoder(base)
    run(decoder, [SampleRequest(make_prompt(200), free(3, seed)) for seed in range(16)])
    assert decoder.num_read == 200 + 15 * 8


def test_a_scored_prompt_has_the_same_numbers_in_every_request(
    base: DecodeBase, adapters: list[AdapterWeights]
) -> None:
    """Log-probs of a prompt are the same bits alone, with samples, and after the prompt was kept."""
    decoder = Decoder(base)
    prompt = make_prompt(150)
    run(decoder, [SampleRequest(prompt, free(2), adapters[0])])
    outcomes = run(
        decoder,
        [
            SampleRequest(prompt, weights=adapters[0], num_samples=0),
            SampleRequest(prompt, free(5), adapters[0], 3, prompt_logprobs=True),
        ],
    )
    first, second = (one.prompt_logprobs_T for one in outcomes)
    assert first is not None
    assert second is not None
    assert first.tobytes() == second.tobytes()


def test_a_sample_that_loses_its_place_goes_on_as_if_it_had_not(
    base: DecodeBase, adapters: list[AdapterWeights]
) -> None:
    """With memory for a few sequences only, samples are paused and read again, and no bit changes."""
    requests = [
        SampleRequest(make_prompt(40 + 9 * place, place), free(180, place), weights, owner=f"o{place % 3}")
        for place, weights in enumerate([None, *adapters, None, *adapters, None, *adapters][:14])
    ]
    roomy, tight = Decoder(base), Decoder(base, max_cache_tokens=1)
    expected, found = run(roomy, requests), run(tight, requests)
    assert roomy.num_preemptions == 0
    assert tight.num_preemptions > 3
    for one, two in zip(expected, found, strict=True):
        assert_same_bits(one, two)


def test_memory_stays_within_its_budget(base: DecodeBase) -> None:
    """Whatever comes, keys and values never take more than the budget."""
    decoder = Decoder(base, max_cache_tokens=1)
    info = base.info
    budget = 4 * info.max_context * info.num_layers * 2 * info.num_kv_heads * info.head_dim * 4
    for place in range(12):
        decoder.add(SampleRequest(make_prompt(30 * (place + 1), place), free(100, place), num_samples=1 + place % 4))
    most = 0
    while decoder.has_work:
        decoder.step()
        most = max(most, decoder.num_cache_bytes)
    assert budget * 0.8 < most <= budget


def test_who_has_no_place_takes_one_from_who_has_most(base: DecodeBase) -> None:
    """A tenant that comes to a full sampler gets a place at once, and the one who lost it loses nothing else."""
    long = [SampleRequest(make_prompt(20, place), free(200, place), owner="flood") for place in range(4)]
    expected = run(Decoder(base), long)
    decoder = Decoder(base, max_sequences=4)
    numbers = [decoder.add(request) for request in long]
    outcomes: dict[int, Outcome] = {}
    for _ in range(20):
        collect(outcomes, decoder.step())
    late = decoder.add(SampleRequest(make_prompt(9), free(5), owner="late"))
    for _ in range(8):
        collect(outcomes, decoder.step())
    assert outcomes[late].stops == {0: "length"}
    while decoder.has_work:
        collect(outcomes, decoder.step())
    assert decoder.num_preemptions == 1
    for number, alone in zip(numbers, expected, strict=True):
        assert_same_bits(alone, outcomes[number])


def test_places_go_by_tokens_served(base: DecodeBase) -> None:
    """Of two tenants with as many requests, the one with short answers finishes more of them in the same time."""
    decoder = Decoder(base, max_sequences=4)
    owner_of = {}
    for place in range(40):
        owner = place % 2
        request = SampleRequest(make_prompt(8, place), free(120 if owner else 8), owner="ab"[owner])
        owner_of[decoder.add(request)] = owner
    finished = [0, 0]
    while finished[0] < 20:
        for event in decoder.step():
            finished[owner_of[event.request]] += getattr(event, "stop", None) is not None
    assert finished[1] <= 4


def test_a_long_prompt_does_not_hold_up_those_who_decode(base: DecodeBase) -> None:
    """While a prompt of the whole context joins, each of ten samples draws in every step, and a step reads few rows."""
    decoder = Decoder(base)
    decoder.add(SampleRequest(make_prompt(10), free(60), num_samples=10))
    decoder.step()
    decoder.add(SampleRequest(make_prompt(500), free(2)))
    read = [decoder.num_read]
    for _ in range(20):
        events = decoder.step()
        read.append(decoder.num_read)
        assert sum(event.request == 1 for event in events) == 10
    assert np.diff(read).max() <= 16


def test_capacities_follow_from_the_length_alone() -> None:
    """Every length fits its capacity, and one more position asks for the same or the next one."""
    capacities = [capacity_for(length) for length in range(1, 5000)]
    assert all(capacity >= length for length, capacity in enumerate(capacities, start=1))
    assert capacities == sorted(capacities)
    assert capacities[63] == 64
    assert max(capacity / length for length, capacity in enumerate(capacities, start=1) if length > 512) < 1.26


def cache_of(max_positions: int) -> KvCache:
    """Return an empty cache of two layers and heads."""
    return KvCache(2, 2, 32, torch.float32, torch.device("cpu"), max_positions)


def test_memory_of_texts_serves_the_next_and_holds_numbers_only() -> None:
    """What a diverged adapter wrote is left to nobody, be it the next text or a slab."""
    cache = cache_of(4096)
    text = cache.new_text(900)
    assert text.kv_Y2GCd.shape[3] == cache.num_positions == 1024
    text.kv_Y2GCd.fill_(torch.nan)
    address = text.buffer.data_ptr()
    cache.free_text(text)
    assert cache.num_positions == 0
    again = cache.new_text(600)
    assert again.buffer.data_ptr() == address
    assert not again.kv_Y2GCd.any()
    again.kv_Y2GCd.fill_(torch.inf)
    cache.free_text(again)
    short = cache.new_text(300)
    short.length = 300
    slots = [cache.fork(short) for _ in range(2)]
    assert slots[0].slab is slots[1].slab
    assert slots[0].slab.kv_Y2SGCd.data_ptr() == address
    assert slots[0].slab.kv_Y2SGCd.isfinite().all()


def test_a_text_takes_no_more_than_it_needs_where_memory_is_tight() -> None:
    """Else it is given a size that does for others later."""
    cache = cache_of(1024 + 320)
    roomy = cache.new_text(600, promised=64)
    assert cache.num_positions == 1024 > roomy.kv_Y2GCd.shape[3]
    tight = cache.new_text(300)
    assert tight.buffer.numel() == tight.kv_Y2GCd.numel()
    assert cache.num_positions == cache.max_positions
    promised = cache_of(1024 + 320).new_text(600, promised=400)
    assert promised.buffer.numel() == promised.kv_Y2GCd.numel()
