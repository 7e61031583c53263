"""Quotas as a user of the SDK meets them: the loop waits, and ends as it would have without."""

from tests.support.cluster import Cluster
from treadle import AdamParams, Datum, ModelInput, SamplingParams, ServiceClient, TensorData

LENGTH, STEPS = 100, 6


def datum() -> Datum:
    """Returns a sequence of LENGTH positions with weight 1."""
    tokens = [5 + n % 90 for n in range(LENGTH + 1)]
    inputs = {"target_tokens": TensorData(tokens[1:], "int64", [LENGTH])}
    inputs["weights"] = TensorData([1.0] * LENGTH, "float32", [LENGTH])
    return Datum(model_input=ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)


def losses(service: ServiceClient) -> list[float]:
    """Trains some steps, all queued ahead, and returns their losses."""
    training = service.create_lora_training_client("treadle/pip", rank=4, seed=3)
    results = []
    for _ in range(STEPS):
        results.append(training.forward_backward([datum()], "cross_entropy"))
        training.optim_step(AdamParams(learning_rate=1e-3, eps=1e-8))
    return [result.result().metrics["loss:sum"] for result in results]


def test_a_loop_over_its_quota_is_slower_and_otherwise_the_same(cluster: Cluster) -> None:
    """No exception, the same bits, and every token is charged once."""
    with (
        ServiceClient(cluster.gateway_address, cluster.admin_key) as admin,
        ServiceClient(cluster.gateway_address, cluster.new_tenant()) as free,
        ServiceClient(cluster.gateway_address, cluster.new_tenant()) as limited,
    ):
        tenant = limited.get_server_capabilities().tenant
        # The first minute's credit is spent by the second step; from then on each step waits for a second.
        admin.set_quota(tenant, training_tokens_per_minute=6000, sampling_tokens_per_minute=6000)
        training = limited.create_lora_training_client("treadle/pip", rank=4, seed=1)
        training.forward_backward([datum()] * 60, "cross_entropy").result()
        assert losses(limited) == losses(free)
        assert limited.get_quota() == {"training_tokens_per_minute": 6000, "sampling_tokens_per_minute": 6000}
        sampler = limited.create_sampling_client(base_model="treadle/pip")
        prompt = ModelInput.from_ints([5, 6, 7])
        drawn = [sampler.sample(prompt, 1, SamplingParams(max_tokens=8, seed=1)) for _ in range(20)]
        assert len({tuple(sample.result().sequences[0].tokens) for sample in drawn}) == 1
        used = limited.get_usage()
        assert used.total.training_tokens == LENGTH * (60 + STEPS)
        assert sum(use.training_tokens for use in used.by_run.values()) == used.total.training_tokens
