"""The reinforcement loop against real services: synchronous, one step off, and with a sampler that is killed."""

from threading import Thread
from typing import Any

import pytest

from tests.support.cluster import Cluster
from treadle import ModelInput, SamplingParams, ServiceClient
from treadle.recipes.chat import prompt_tokens
from treadle.recipes.loops import StepReport, rl_steps
from treadle.recipes.tasks import DEMO_TASKS

BASE = "treadle/pip"
STEPS = 3


def climb(service: ServiceClient, ahead: int) -> tuple[str, list[StepReport]]:
    """Returns the run and the reports of a few steps with a reward that every sample can raise."""
    task = DEMO_TASKS[BASE].rl
    training = service.create_lora_training_client(BASE, rank=4, seed=3, train_unembed=False)
    tokenizer = training.get_tokenizer()

    def prompts(step: int) -> list[tuple[str, list[int]]]:
        return [(q, prompt_tokens(tokenizer, task.messages(q))) for q in task.batch(step)[:2]]

    steps = rl_steps(
        training,
        tokenizer,
        prompts,
        lambda _, completion: float(len(completion)),
        steps=STEPS,
        group_size=4,
        params=SamplingParams(max_tokens=12, seed=7, temperature=1.5),
        learning_rate=5e-3,
        ahead=ahead,
    )
    return training.run, list(steps)


@pytest.mark.parametrize("ahead", [0, 1, 5])
def test_every_step_trains_on_samples_of_the_right_age(cluster: Cluster, ahead: int) -> None:
    """Weights are published as often as somebody samples from them; the first batch is everybody's the same."""
    with ServiceClient(cluster.gateway_address, cluster.new_tenant()) as service:
        run, reports = climb(service, ahead)
        _, synchronous = climb(service, 0)
        revisions = service.list_revisions(run)
    assert [report.step for report in reports] == [1, 2, 3]
    assert all(revision.unnamed for revision in revisions)
    assert sorted(revision.step for revision in revisions) == list(range(max(1, STEPS - ahead)))
    assert reports[0].value == synchronous[0].value
    assert reports[0].num_tokens == synchronous[0].num_tokens > 0


def test_a_killed_sampler_changes_no_token(own_cluster: Cluster) -> None:
    """Whole answers and streams that were under way are repeated and go on, with the tokens of an unbroken run."""
    own_cluster.start()
    with ServiceClient(own_cluster.gateway_address, own_cluster.new_tenant()) as service:
        training = service.create_lora_training_client(BASE, rank=4, seed=3)
        sampler = training.save_weights_and_get_sampling_client()
        prompt = ModelInput.from_ints(list(range(3, 19)))
        params = SamplingParams(max_tokens=300, seed=5, temperature=1.3)
        expected = [list(s.tokens) for s in sampler.sample(prompt, 8, params).result().sequences]
        handle = sampler.sample(prompt, 8, params)
        streamed: list[list[int]] = [[] for _ in range(8)]
        kill = Thread(target=own_cluster.kill, args=("sampler",))
        for number, delta in enumerate(sampler.sample_stream(prompt, 8, params)):
            streamed[delta.index] += delta.tokens
            if number == 10:
                kill.start()
                kill.join()
                own_cluster.launch("sampler")
        assert streamed == expected
        assert [list(s.tokens) for s in handle.result().sequences] == expected


def test_with_two_samplers_each_answers_and_one_may_die(own_cluster: Cluster) -> None:
    """Runs spread over the samplers; when one dies the other answers for its runs, with the same tokens."""
    own_cluster.start()
    second = _second_sampler(own_cluster)
    try:
        with ServiceClient(own_cluster.gateway_address, own_cluster.new_tenant()) as service:
            prompt = ModelInput.from_ints(list(range(3, 19)))
            params = SamplingParams(max_tokens=6, seed=5)
            clients = []
            for seed in range(6):
                training = service.create_lora_training_client(BASE, rank=2, seed=seed)
                clients.append(training.save_weights_and_get_sampling_client())
            before = [client.sample(prompt, 1, params).result().sequences[0].tokens for client in clients]
            second.kill("sampler")
            after = [client.sample(prompt, 1, params).result().sequences[0].tokens for client in clients]
        assert [list(tokens) for tokens in after] == [list(tokens) for tokens in before]
    finally:
        second.close()


def _second_sampler(cluster: Cluster) -> Any:  # A Cluster of one.
    """Returns a cluster whose only process is another sampler of the first one's store."""
    token = cluster.environment("sampler")["TREADLE_SAMPLER_INTERNAL_TOKEN"]
    settings = {
        "TREADLE_SAMPLER_WORKER": "sampler-1",
        "TREADLE_SAMPLER_STORE_ADDRESS": cluster.addresses["store"],
        "TREADLE_SAMPLER_INTERNAL_TOKEN": token,
    }
    second = Cluster(cluster.folder / "second", settings=settings)
    second.folder.mkdir()
    second.launch("sampler")
    second.wait_ready(["sampler"])
    return second
