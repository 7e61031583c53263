"""Processes that die in the middle of a Tinker program: it goes on, with the numbers of an undisturbed run."""

from collections.abc import Callable

import numpy as np
import pytest
import tinker
import torch
from tinker import types

from tests.interop.conftest import ALIAS, sdk
from tests.interop.test_tinker_loops import adam, batch, logprobs
from tests.support.cluster import Cluster


def restart(cluster: Cluster, role: str) -> None:
    """Kills a service as a crash would and starts it again at its address."""
    cluster.kill(role)
    cluster.launch(role)
    cluster.wait_ready([role])


def loop(service: tinker.ServiceClient, disturb: Callable[[int], None]) -> list[np.ndarray]:
    """Trains with steps queued ahead, samples, and returns every number; `disturb` is called between submissions."""
    training = service.create_lora_training_client(ALIAS, rank=4, seed=31).result()
    data = batch(training)
    results = []
    for number in range(6):
        results.append(training.forward_backward(data, "cross_entropy"))
        training.optim_step(adam())
        disturb(number)
    sampler = training.save_weights_and_get_sampling_client().result()
    params = types.SamplingParams(max_tokens=12, seed=5)
    sampling = [sampler.sample(types.ModelInput.from_ints([1, 5, 9]), 2, params) for _ in range(3)]
    # More than a future's id holds: a gateway that was started since cannot know it, and the SDK sends it again.
    targets = types.TensorData.from_torch(torch.randint(0, 1024, (399, 128), generator=torch.manual_seed(0)))
    long = types.ModelInput.from_ints([1, *range(5, 404)])
    scoring = sampler.sample(long, 1, params, target_prompt_logprobs=targets)
    disturb(99)
    numbers = [logprobs(result.result()) for result in results]
    numbers += [np.array(s.logprobs) for answer in sampling for s in answer.result().sequences]
    return [*numbers, scoring.result().target_prompt_logprobs.to_numpy()]


@pytest.mark.timeout(600)
def test_a_killed_gateway_and_a_killed_trainer_are_not_noticed(make_cluster: Callable[..., Cluster]) -> None:
    """Futures that were given out before are answered after, the sampled ones too."""
    cluster = make_cluster()
    with sdk(cluster) as service:
        expected = loop(service, lambda _: None)

    def disturb(number: int) -> None:
        if number in (1, 99):
            restart(cluster, "gateway")
        elif number == 3:
            restart(cluster, "trainer")

    with sdk(cluster) as service:
        disturbed = loop(service, disturb)
    assert all(np.array_equal(a, b) for a, b in zip(disturbed, expected, strict=True))
