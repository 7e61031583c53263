"""What samples mean to programs: stops, seeds, log-probs of all kinds, pollers, clones, cancelling."""

import asyncio
import pickle

import httpx
import numpy as np
import pytest
import tinker
import torch
from tinker import types

from tests.interop.conftest import ALIAS, sdk
from tests.support.cluster import Cluster

END = 2
PROMPT = "The capital of Italy is"


@pytest.fixture(scope="module")
def service(tinker_cluster: Cluster):
    """A client of a tenant of this module's own."""
    with sdk(tinker_cluster) as client:
        yield client


@pytest.fixture(scope="module")
def sampler(service: tinker.ServiceClient) -> tinker.SamplingClient:
    """Samples from the base."""
    return service.create_sampling_client(base_model=ALIAS).result()


@pytest.fixture(scope="module")
def tokens(service: tinker.ServiceClient) -> list[int]:
    """The prompt."""
    training = service.create_lora_training_client(ALIAS, rank=1).result()
    return training.get_tokenizer().encode(PROMPT)


def params(**values: object) -> types.SamplingParams:
    """Returns parameters that draw the same whenever they are used."""
    return types.SamplingParams(**({"max_tokens": 8, "seed": 3} | values))


def test_a_seed_makes_samples_reproducible_and_different(sampler: tinker.SamplingClient, tokens: list[int]) -> None:
    """Sample i is the same in every request; without a seed requests differ."""
    prompt = types.ModelInput.from_ints(tokens)
    first, again = (sampler.sample(prompt, 4, params()).result() for _ in range(2))
    drawn = [tuple(s.tokens) for s in first.sequences]
    assert [tuple(s.tokens) for s in again.sequences] == drawn
    assert len(set(drawn)) > 1
    free = [sampler.sample(prompt, 1, params(seed=None, max_tokens=16)).result() for _ in range(2)]
    assert free[0].sequences[0].tokens != free[1].sequences[0].tokens
    assert len({s.sequence_id for s in first.sequences}) == 4


def test_stops_are_kept_once_as_the_last_token(sampler: tinker.SamplingClient, tokens: list[int]) -> None:
    """As ids and as texts; length is said where max_tokens ended it; an empty list turns even the end off."""
    prompt = types.ModelInput.from_ints(tokens)
    for seed in range(50):
        plain = sampler.sample(prompt, 1, params(max_tokens=12, seed=seed, stop=[])).result().sequences[0]
        assert (plain.stop_reason, len(plain.tokens), len(plain.logprobs)) == ("length", 12, 12)
        if len(set(plain.tokens[:4])) == 4 and END not in plain.tokens[:4]:
            break
    wanted = params(max_tokens=12, seed=seed, stop=[plain.tokens[3]])
    stopped = sampler.sample(prompt, 1, wanted).result().sequences[0]
    assert (stopped.stop_reason, list(stopped.tokens)) == ("stop", list(plain.tokens[:4]))
    endless = sampler.sample(prompt, 1, params(max_tokens=40, stop=[])).result().sequences[0]
    assert len(endless.tokens) == 40


def test_logprobs_are_those_of_the_tempered_distribution(sampler: tinker.SamplingClient, tokens: list[int]) -> None:
    """Differences of a position's log-probs scale with 1 / temperature."""
    prompt = types.ModelInput.from_ints(tokens)
    tops = {}
    for temperature in (1.0, 2.0):
        drawn = sampler.sample(prompt, 1, params(max_tokens=1, temperature=temperature), topk_sample_logprobs=50)
        tops[temperature] = drawn.result().sequences[0].topk_logprobs
    (cold,), (hot,) = tops.values()
    assert len(cold) == 50
    assert [token for token, _ in cold[:10]] == [token for token, _ in hot[:10]]
    gaps = [np.array([logprob for _, logprob in top[:10]]) - top[0][1] for top in (cold, hot)]
    assert np.allclose(gaps[0], 2 * gaps[1], atol=1e-4)


def test_the_prompts_own_logprobs(sampler: tinker.SamplingClient, tokens: list[int]) -> None:
    """None for the first; the last n alone; the likeliest; those of named tokens, dense and sparse."""
    prompt = types.ModelInput.from_ints(tokens)
    n = len(tokens)
    targets = torch.full((n - 1, 2), -1, dtype=torch.int64)
    targets[:, 0] = torch.tensor(tokens[1:])
    common = {"include_prompt_logprobs": True, "topk_prompt_logprobs": 3}
    dense = sampler.sample(
        prompt, 1, params(max_tokens=1), target_prompt_logprobs=types.TensorData.from_torch(targets), **common
    ).result()
    scored = dense.prompt_logprobs
    assert scored[0] is None
    assert len(scored) == n
    named = dense.target_prompt_logprobs.to_torch()
    assert named.shape == (n - 1, 2)
    assert torch.allclose(named[:, 0], torch.tensor(scored[1:]), atol=1e-5)
    assert dense.topk_prompt_logprobs[0] is None
    assert all(len(top) == 3 for top in dense.topk_prompt_logprobs[1:])
    wide = torch.cat([targets, torch.full((n - 1, 30), -1)], dim=1)
    layout = types.TensorData.from_torch_sparse(wide, pad_value=-1)
    sparse = sampler.sample(prompt, 1, params(max_tokens=1), target_prompt_logprobs=layout, **common).result()
    assert sparse.target_prompt_logprobs.sparse_crow_indices is not None
    assert np.allclose(np.array(sparse.target_prompt_logprobs.data), named[:, 0].numpy(), atol=1e-5)
    last = sampler.compute_logprobs(prompt, prompt_logprobs_last_n=2).result()
    assert last[: n - 2] == [None] * (n - 2)
    assert np.allclose(last[n - 2 :], scored[n - 2 :], atol=1e-5)


def test_a_poller_of_a_whole_session_gets_what_single_polls_get(
    service: tinker.ServiceClient, tokens: list[int]
) -> None:
    """retrieve_futures, as the SDK asks when a server tells it to."""
    prompt = types.ModelInput.from_ints(tokens)
    sampler = service.create_sampling_client(base_model=ALIAS).result()
    expected = sampler.sample(prompt, 2, params()).result()
    holder = sampler.holder
    before = holder._client_config
    holder._client_config = before.model_copy(update={"sample_use_retrieve_futures": True})
    try:
        polled = [sampler.sample(prompt, 2, params()) for _ in range(3)]
        for answer in polled:
            assert [s.tokens for s in answer.result().sequences] == [s.tokens for s in expected.sequences]
    finally:
        holder._client_config = before


def test_a_pickled_client_samples_on(sampler: tinker.SamplingClient, tokens: list[int]) -> None:
    """A clone draws what its original draws from the same seed."""
    prompt = types.ModelInput.from_ints(tokens)
    clone = pickle.loads(pickle.dumps(sampler))
    drawn = [client.sample(prompt, 1, params()).result().sequences[0].tokens for client in (sampler, clone)]
    assert list(drawn[0]) == list(drawn[1])


async def test_small_requests_that_programs_make_in_passing(tinker_cluster: Cluster) -> None:
    """Joining, cancelling, reporting, finishing, asking who one is and how to behave."""
    key = tinker_cluster.new_tenant()
    where = f"http://{tinker_cluster.http_address}/api/v1"
    async with httpx.AsyncClient(base_url=where, headers={"x-api-key": key}, timeout=60) as client:
        config = (await client.post("/client/config", json={"sdk_version": "0.38.0"})).json()
        assert config["parallel_fwdbwd_chunks"] is False
        assert (await client.post("/client/dynamic_config", json={})).status_code == 200
        session = (await client.post("/create_session", json={"tags": [], "sdk_version": "x"})).json()["session_id"]
        assert (await client.post("/session_heartbeat", json={"session_id": session})).status_code == 200
        body = {"session_id": session, "sampling_session_seq_id": 0, "base_model": ALIAS}
        sampler = (await client.post("/create_sampling_session", json=body)).json()["sampling_session_id"]
        joins = [client.post("/join_sampling_session", json={"sampling_session_id": sampler}) for _ in range(3)]
        assert len({answer.json()["client_counter"] for answer in await asyncio.gather(*joins)}) == 3
        long = {
            "sampling_session_id": sampler,
            "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1, 5]}]},
            "sampling_params": {"max_tokens": 200, "stop": []},
        }
        request_id = (await client.post("/asample", json=long)).json()["request_id"]
        assert (await client.post("/cancel_future", json={"request_id": request_id})).status_code == 204
        # Asked for all the same, it is drawn again: its id is the whole request.
        assert (await client.post("/retrieve_future", json={"request_id": request_id})).status_code == 200
        assert (await client.post("/telemetry", json={"events": []})).json() == {"status": "accepted"}
        assert (await client.get("/auth/apikey/me")).json()["org_urn"].startswith("tenant:tenant-")
        assert (
            await client.post(f"/sessions/{session}/finish", json={"reason": {"type": "success"}})
        ).status_code == 204
        assert (await client.get("/healthz")).json() == {"status": "ok"}
