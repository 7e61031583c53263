"""What the real SDK raises for each mistake: the class, the sentence, and never minutes of silent retries."""

import asyncio

import httpx
import numpy as np
import pytest
import tinker
from tinker import types

from tests.interop.conftest import ALIAS, sdk
from tests.interop.test_tinker_loops import adam, batch, datum, logprobs
from tests.support.cluster import Cluster

NO_KEY = "tml-treadle_nobody_12345678_0123456789"


def text(tokens: list[int], **inputs: object) -> types.Datum:
    """Returns a datum with these loss inputs."""
    return types.Datum(model_input=types.ModelInput.from_ints(tokens), loss_fn_inputs=inputs)


def image() -> types.Datum:
    """Returns a datum with a picture."""
    picture = types.ImageChunk(data=b"\x89PNG", format="png", expected_tokens=1)
    return types.Datum(
        model_input=types.ModelInput(chunks=[picture]), loss_fn_inputs={"target_tokens": [1], "weights": [1.0]}
    )


@pytest.fixture(scope="module")
def service(tinker_cluster: Cluster):
    """A client of a tenant of this module's own."""
    with sdk(tinker_cluster) as client:
        yield client


@pytest.fixture(scope="module")
def training(service: tinker.ServiceClient) -> tinker.TrainingClient:
    """A run that all mistakes are made with: after each it goes on."""
    return service.create_lora_training_client(ALIAS, rank=4, seed=41).result()


CREATING = {
    "unknown base": (lambda s: s.create_lora_training_client("org/none"), tinker.NotFoundError, "is not served here"),
    "rank 0": (
        lambda s: s.create_lora_training_client(ALIAS, rank=0),
        tinker.BadRequestError,
        "lora_config.rank must be positive",
    ),
    "dimuon": (
        lambda s: s.create_lora_training_client(ALIAS, optimizer=types.DimuonOptimizerConfig(version=1)),
        tinker.BadRequestError,
        "trained with adamw",
    ),
    "no such state": (
        lambda s: s.create_training_client_from_state("tinker://s-0123456789abcdef:train:0/weights/x"),
        tinker.NotFoundError,
        "there is no saved adapter",
    ),
    "weights of a sampler with an optimizer": (
        lambda s: s.create_training_client_from_state_with_optimizer("tinker://r/sampler_weights/x"),
        tinker.BadRequestError,
        "no optimizer state",
    ),
    "a path that is none": (
        lambda s: s.create_training_client_from_state("tinker://r/wrong/x"),
        (tinker.BadRequestError, ValueError),
        "path",
    ),
    "sampling from what is not there": (
        lambda s: s.create_sampling_client(model_path="tinker://r/sampler_weights/none"),
        tinker.NotFoundError,
        "there is no saved adapter",
    ),
    "sampling from an unknown base": (
        lambda s: s.create_sampling_client(base_model="org/none"),
        tinker.NotFoundError,
        "is not served here",
    ),
}


@pytest.mark.parametrize("case", sorted(CREATING))
def test_what_cannot_be_made_is_refused_at_once(service: tinker.ServiceClient, case: str) -> None:
    """With a status that the SDK does not repeat."""
    act, error, sentence = CREATING[case]
    with pytest.raises(error, match=sentence):
        act(service).result()


TRAINING = {
    "unknown loss": (lambda t: t.forward_backward([datum([1, 2, 3])], "custom"), "custom"),
    "token out of range": (lambda t: t.forward_backward([datum([1, 2_000_000])], "cross_entropy"), "datum 0"),
    "a target too few": (
        lambda t: t.forward_backward([text([1, 2], target_tokens=[1], weights=[1.0])], "cross_entropy"),
        r"target_tokens has the shape \[1\]",
    ),
    "a weight that is no number": (
        lambda t: t.forward_backward(
            [text([1, 2], target_tokens=[1, 2], weights=[float("nan"), 1.0])], "cross_entropy"
        ),
        "not finite",
    ),
    "no advantages": (
        lambda t: t.forward_backward([text([1, 2], target_tokens=[1, 2], logprobs=[0.0, 0.0])], "ppo"),
        "advantages",
    ),
    "other inputs than the first": (
        lambda t: t.forward_backward([datum([1, 2, 3]), text([1], target_tokens=[1])], "cross_entropy"),
        "datum 1: all data of a batch have the same loss inputs",
    ),
    "too long": (lambda t: t.forward_backward([datum([1] * 200_000)], "cross_entropy"), "longer|positions|bytes"),
    "a picture": (lambda t: t.forward_backward([image()], "cross_entropy"), "text only"),
    "a text as a setting": (
        lambda t: t.forward_backward([datum([1, 2])], "cross_entropy", {"mode": "fast"}),
        "takes none",
    ),
    "dimuon": (lambda t: t.optim_step(types.DimuonParams(learning_rate=1e-3)), "use AdamParams"),
    "a bad learning rate": (lambda t: t.optim_step(adam(-1.0)), "learning_rate"),
    "encryption": (
        lambda t: t.save_weights_external("x", age_encryption_recipients=["age1abc"]),
        "not encrypted here",
    ),
    "inflight": (lambda t: t.save_weights_and_get_sampling_client(kind="inflight"), "snapshot"),
}


@pytest.mark.parametrize("case", sorted(TRAINING))
def test_a_mistake_in_training_comes_through_the_future_and_the_run_goes_on(
    training: tinker.TrainingClient, case: str
) -> None:
    """As the user's, and at the place in the order where it was made; the step behind a bad batch does not happen."""
    act, sentence = TRAINING[case]
    with pytest.raises(tinker.RequestFailedError, match=sentence) as caught:
        act(training).result()
    assert caught.value.category.value == "user"
    step = training.optim_step(adam())
    if case not in ("dimuon", "a bad learning rate", "encryption", "inflight"):
        with pytest.raises(tinker.RequestFailedError, match="dropped"):
            step.result()
    else:
        step.result()
    data = batch(training)
    before = logprobs(training.forward_backward(data, "cross_entropy").result())
    training.optim_step(adam()).result()
    assert not np.array_equal(logprobs(training.forward(data, "cross_entropy").result()), before)


def test_mistakes_in_sampling(service: tinker.ServiceClient) -> None:
    """Too long for the context is said with the hosted service's sentence."""
    sampler = service.create_sampling_client(base_model=ALIAS).result()
    prompt = types.ModelInput.from_ints([1, 5, 9])
    with pytest.raises(tinker.BadRequestError, match=r"exceeds the model's context window: 3 \+ 1000000 > "):
        sampler.sample(prompt, 1, types.SamplingParams(max_tokens=1_000_000)).result()
    for params, sentence in (
        (types.SamplingParams(max_tokens=4, temperature=-1), "temperature"),
        (types.SamplingParams(max_tokens=4, top_p=2), "top_p"),
        (types.SamplingParams(max_tokens=0), "max_tokens"),
    ):
        with pytest.raises((tinker.RequestFailedError, tinker.BadRequestError), match=sentence):
            sampler.sample(prompt, 1, params).result()
    with pytest.raises((tinker.RequestFailedError, tinker.BadRequestError), match="token"):
        sampler.sample(types.ModelInput.from_ints([1, 2_000_000]), 1, types.SamplingParams(max_tokens=4)).result()


def test_a_key_of_nobody_is_refused_at_once(tinker_cluster: Cluster) -> None:
    """The constructor raises what the gateway said."""
    with pytest.raises(tinker.AuthenticationError, match="unknown, revoked or expired"):
        tinker.RestClient(
            base_url=f"http://{tinker_cluster.http_address}", api_key=NO_KEY
        ).get_server_capabilities().result()


BODIES: dict[str, tuple[str, bytes, int, str]] = {
    "no JSON": ("optim_step", b"{", 400, "JSON"),
    "an unknown field": ("optim_step", b'{"model_id":"m","seq_id":1,"rate":2}', 400, "rate"),
    "no seq": ("optim_step", b'{"model_id":"m"}', 400, "seq_id"),
    "no protobuf": ("forward_backward", b"\xff\xff", 400, "ForwardBackwardRequest"),
    "a future of nobody": ("retrieve_future", b'{"request_id":"o-abc"}', 200, "there is no request"),
    "a run of nobody": ("get_info", b'{"model_id":"s-0123456789abcdef:train:0"}', 404, "there is no run"),
    "a session that is none": ("session_heartbeat", b'{"session_id":"me"}', 403, "Invalid session_id"),
    "an early metadata poll of a sample that is gone": ("retrieve_future", b'{"request_id":"m-abc"}', 410, "gone"),
    "a loss to be uploaded": ("create_custom_loss", b"{}", 400, "forward_backward_custom"),
}


@pytest.mark.parametrize("case", sorted(BODIES))
def test_bodies_that_no_sdk_sends(tinker_cluster: Cluster, case: str) -> None:
    """A sentence each, in the form that the SDK prints."""
    path, body, status, sentence = BODIES[case]
    key = tinker_cluster.new_tenant()
    answer = httpx.post(f"http://{tinker_cluster.http_address}/api/v1/{path}", content=body, headers={"x-api-key": key})
    assert answer.status_code == status, answer.text
    shown = answer.json()
    assert sentence in shown.get("detail", shown.get("error", ""))


async def test_a_poll_is_held_and_a_gap_is_not_waited_for_in_vain(tinker_cluster: Cluster) -> None:
    """An operation whose predecessor never came is 408 after a hold, not at once; its turn may yet come."""
    key = tinker_cluster.new_tenant()
    where = f"http://{tinker_cluster.http_address}/api/v1"
    async with httpx.AsyncClient(base_url=where, headers={"x-api-key": key}, timeout=60) as client:
        session = (await client.post("/create_session", json={"tags": [], "sdk_version": "x"})).json()["session_id"]
        model = {"session_id": session, "model_seq_id": 0, "base_model": ALIAS, "lora_config": {"rank": 4}}
        made = (await client.post("/create_model", json=model)).json()
        step = {"model_id": made["model_id"], "adam_params": {}}
        second = (await client.post("/optim_step", json={**step, "seq_id": 2})).json()["request_id"]
        polling = asyncio.create_task(client.post("/retrieve_future", json={"request_id": second}))
        done, _ = await asyncio.wait({polling}, timeout=3)
        assert not done
        first = (await client.post("/optim_step", json={**step, "seq_id": 1})).json()["request_id"]
        assert "metrics" in (await polling).json()
        for request_id in (first, second, first):
            answer = await client.post("/retrieve_future", json={"request_id": request_id})
            assert "metrics" in answer.json()
        again = (await client.post("/optim_step", json={**step, "seq_id": 1})).json()["request_id"]
        assert again == first
        other = await client.post("/optim_step", json={**step, "seq_id": 1, "adam_params": {"beta1": 0.5}})
        assert (other.status_code, other.json()["reason"]) == (400, "SEQ_REUSED")
