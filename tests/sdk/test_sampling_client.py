"""The sampling client against real services: reproducible samples, streams, log-probs, fresh revisions."""

import asyncio
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import pytest

from tests.support.cluster import Cluster
from tests.support.proxy import TroubleProxy
from treadle import AdamParams, Datum, ModelInput, SamplingParams, ServiceClient
from treadle.errors import BadNameError, BadSamplingParamsError, NotFoundError, TreadleError

BASE = "treadle/pip"
PROMPT = ModelInput.from_ints([1, 5, 9, 20])
PARAMS = SamplingParams(max_tokens=12, seed=3, temperature=1.0, stop=[])


@pytest.fixture(scope="module")
def key(cluster: Cluster) -> str:
    return cluster.new_tenant()


@pytest.fixture
def service(cluster: Cluster, key: str) -> Iterator[ServiceClient]:
    with ServiceClient(cluster.gateway_address, key) as client:
        yield client


def test_a_seed_gives_the_same_samples_and_different_ones_among_themselves(service: ServiceClient) -> None:
    """Sample i is a function of the request alone."""
    client = service.create_sampling_client(base_model=BASE)
    handles = [client.sample(PROMPT, 3, PARAMS) for _ in range(2)]
    first, second = (handle.result(60) for handle in handles)
    assert [s.tokens for s in first.sequences] == [s.tokens for s in second.sequences]
    assert [s.logprobs for s in first.sequences] == [s.logprobs for s in second.sequences]
    assert len({tuple(s.tokens) for s in first.sequences}) == 3
    assert all(len(s.tokens) == len(s.logprobs) == 12 for s in first.sequences)
    assert {s.stop_reason for s in first.sequences} == {"length"}
    assert first.prompt_logprobs is None


def test_prompt_logprobs_are_those_that_are_computed_without_decoding(service: ServiceClient) -> None:
    """Both ways give the same numbers; the first token has none."""
    client = service.create_sampling_client(base_model=BASE)
    sampled = client.sample(PROMPT, 1, PARAMS, include_prompt_logprobs=True).result(60).prompt_logprobs
    computed = client.compute_logprobs(PROMPT).result(60)
    assert sampled is not None
    assert computed[0] is None
    assert len(computed) == PROMPT.length
    assert np.allclose(sampled[1:], computed[1:], atol=1e-5)


def test_a_stream_gives_what_the_whole_answer_gives(service: ServiceClient) -> None:
    """Token by token, from a thread or from a loop."""
    client = service.create_sampling_client(base_model=BASE)
    whole = client.sample(PROMPT, 2, PARAMS).result(60)
    by_thread: dict[int, list[int]] = defaultdict(list)
    for delta in client.sample_stream(PROMPT, 2, PARAMS):
        by_thread[delta.index].extend(delta.tokens)
    by_loop: dict[int, list[int]] = defaultdict(list)

    async def collect() -> None:
        async for delta in client.sample_stream(PROMPT, 2, PARAMS):
            by_loop[delta.index].extend(delta.tokens)

    asyncio.run(collect())
    assert [by_thread[i] for i in range(2)] == [by_loop[i] for i in range(2)] == [s.tokens for s in whole.sequences]


def test_a_fresh_revision_is_sampled_without_waiting_for_it(service: ServiceClient) -> None:
    """The client of a revision that is still being saved waits for it by itself."""
    training = service.create_lora_training_client(BASE, rank=8, seed=1)
    tokens = np.array([1, 5, 9, 20, 77, 77, 77, 77])
    datum = Datum(ModelInput.from_ints(tokens[:-1]), {"target_tokens": tokens[1:], "weights": np.ones(7)})
    for _ in range(12):
        training.forward_backward([datum], "cross_entropy")
        training.optim_step(AdamParams(learning_rate=2e-2))
    sampling = training.save_weights_and_get_sampling_client()
    greedy = SamplingParams(max_tokens=3, temperature=0.0)
    assert sampling.sample(PROMPT, 1, greedy).result(60).sequences[0].tokens == [77, 77, 77]
    assert sampling.result(60).model.startswith(training.run)
    base = service.create_sampling_client(base_model=BASE).sample(PROMPT, 1, greedy).result(60)
    assert base.sequences[0].tokens != [77, 77, 77]
    again = service.create_sampling_client(model_path=sampling.model)
    assert again.sample(PROMPT, 1, greedy).result(60).sequences[0].tokens == [77, 77, 77]


def test_lost_connections_do_not_change_the_samples(cluster: Cluster, service: ServiceClient, key: str) -> None:
    """A request is repeated with the seed that it had, and a stream goes on where it was."""
    unseeded = SamplingParams(max_tokens=40, stop=[])
    expected = service.create_sampling_client(base_model=BASE).sample(PROMPT, 2, PARAMS).result(60)
    with TroubleProxy(cluster.gateway_address) as proxy, ServiceClient(proxy.address, key) as client:
        sampling = client.create_sampling_client(base_model=BASE)
        handles = [sampling.sample(PROMPT, 2, unseeded) for _ in range(4)]
        received: dict[int, list[int]] = defaultdict(list)
        for count, delta in enumerate(sampling.sample_stream(PROMPT, 2, PARAMS)):
            received[delta.index].extend(delta.tokens)
            if count in (2, 7):
                proxy.cut()
        assert [received[i] for i in range(2)] == [s.tokens for s in expected.sequences]
        assert all(len(handle.result(60).sequences) == 2 for handle in handles)


def test_impossible_requests_raise_what_is_wrong(service: ServiceClient) -> None:
    """Local checks at the call, the others in the handle."""
    client = service.create_sampling_client(base_model=BASE)
    with pytest.raises(BadSamplingParamsError):
        client.sample(PROMPT, 0, PARAMS)
    with pytest.raises(BadNameError):
        service.create_sampling_client()
    with pytest.raises(BadSamplingParamsError):
        client.sample(PROMPT, 1, SamplingParams(max_tokens=100_000)).result(60)
    with pytest.raises(TreadleError):
        client.sample(ModelInput.empty(), 1, PARAMS).result(60)
    with pytest.raises(NotFoundError):
        service.create_sampling_client(base_model="no/such").sample(PROMPT, 1, PARAMS).result(60)
