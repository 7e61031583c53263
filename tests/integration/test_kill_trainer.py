"""kill -9 of the trainer in the middle of a run changes no number that the user sees."""

import threading

import numpy as np
import pytest

from tests.support.cluster import Cluster
from treadle import AdamParams, Datum, ModelInput, SamplingParams, ServiceClient, TensorData

STEPS, KILL_AT = 30, 12


def sequences(count: int, seed: int) -> list[Datum]:
    """Random sequences of different lengths."""
    generator = np.random.default_rng(seed)
    data = []
    for _ in range(count):
        tokens = generator.integers(3, 1000, int(generator.integers(5, 60)))
        inputs = {
            "target_tokens": TensorData.from_numpy(tokens[1:]),
            "weights": TensorData.from_numpy(np.ones(len(tokens) - 1, dtype=np.float32)),
        }
        data.append(Datum(model_input=ModelInput.from_ints(tokens[:-1].tolist()), loss_fn_inputs=inputs))
    return data


def train(cluster: Cluster, seed: int, kill: bool) -> tuple[list[float], list[float], list[int]]:
    """Trains with everything queued ahead; returns losses, gradient norms and a sample from the result."""
    with ServiceClient(cluster.gateway_address, cluster.new_tenant()) as service:
        training = service.create_lora_training_client("treadle/pip", rank=4, seed=seed)
        handles = []
        for step in range(STEPS):
            loss = training.forward_backward(sequences(6, 100 * seed + step), "cross_entropy")
            handles.append((loss, training.optim_step(AdamParams(learning_rate=1e-2, grad_clip_norm=1.0))))
        if kill:
            handles[KILL_AT][1].result(120)
            cluster.kill("trainer")
            cluster.launch("trainer")
        losses = [loss.result(120).metrics["loss:sum"] for loss, _ in handles]
        norms = [step.result(120).metrics["grad_norm:mean"] for _, step in handles]
        sampler = training.save_weights_and_get_sampling_client("final")
        params = SamplingParams(max_tokens=12, temperature=1.0, seed=5)
        sample = sampler.sample(ModelInput.from_ints([1, 5, 9]), 1, params).result(120).sequences[0]
        return losses, norms, list(sample.tokens)


@pytest.mark.timeout(300)
def test_two_tenants_finish_with_the_same_bits_whether_or_not_the_trainer_is_killed(own_cluster: Cluster) -> None:
    """Losses, gradient norms and samples of both tenants equal those of undisturbed runs, alone."""
    own_cluster.start()
    calm = [train(own_cluster, seed, kill=False) for seed in (1, 2)]
    stormy: dict[int, tuple[list[float], list[float], list[int]]] = {}

    def work(seed: int) -> None:
        stormy[seed] = train(own_cluster, seed, kill=seed == 1)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [stormy[1], stormy[2]] == calm
