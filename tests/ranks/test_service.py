"""A trainer and a sampler of two ranks each, started by the command of the manifests, seen through the SDK."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.support.cluster import START_SECONDS, Cluster, free_port, group_command
from treadle import AdamParams, Datum, ModelInput, SamplingParams, ServiceClient, TensorData, TrainingClient

WAIT_SECONDS = 240.0
GROUPS = ("trainer", "sampler")
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Services of which trainer and sampler are groups."""
    settings = {"TREADLE_TRAINER_SNAPSHOT_EVERY_STEPS": "4"}
    running = Cluster(tmp_path_factory.mktemp("grouped") / "cluster", settings=settings, ranks=dict.fromkeys(GROUPS, 2))
    try:
        running.start()
        yield running
    finally:
        running.close()


def rows(step: int) -> list[Datum]:
    """Returns a small batch."""
    generator = np.random.default_rng(step)
    data = []
    for length in (40, 7, 23):
        tokens = generator.integers(3, 1000, length + 1)
        inputs = {
            "target_tokens": TensorData.from_numpy(tokens[1:]),
            "weights": TensorData.from_numpy(np.ones(length, dtype=np.float32)),
        }
        data.append(Datum(ModelInput.from_ints(tokens[:-1].tolist()), inputs))
    return data


def train(training: TrainingClient, first: int, stop: int) -> list[float]:
    """Makes some steps and returns their losses."""
    handles = [
        (training.forward_backward(rows(step), "cross_entropy"), training.optim_step(AdamParams(learning_rate=1e-3)))
        for step in range(first, stop)
    ]
    losses = []
    for ran, stepped in handles:
        losses.append(ran.result(WAIT_SECONDS).metrics["loss:sum"])
        stepped.result(WAIT_SECONDS)
    return losses


def draw(training: TrainingClient) -> tuple[list[int], list[float]]:
    """Publishes the weights and returns the tokens of a sample and their log-probs."""
    sampling = training.save_weights_and_get_sampling_client()
    params = SamplingParams(max_tokens=16, seed=3, temperature=1.0)
    (sequence,) = sampling.sample(ModelInput.from_ints([5, 9, 200, 31]), 1, params).result(WAIT_SECONDS).sequences
    assert sequence.logprobs is not None
    return list(sequence.tokens), list(sequence.logprobs)


def test_loops_run_on_groups_as_on_single_workers(grouped: Cluster, cluster: Cluster) -> None:
    """Losses and samples of the same loop agree; so do those after the loss of a rank, which the owner does not see."""
    losses: dict[str, list[float]] = {}
    samples: dict[str, tuple[list[int], list[float]]] = {}
    for name, running in (("single", cluster), ("group", grouped)):
        with ServiceClient(running.gateway_address, running.new_tenant()) as service:
            training = service.create_lora_training_client("treadle/pip", rank=8, seed=3)
            losses[name] = train(training, 0, 6)
            if name == "group":
                # Its journal has steps behind the last snapshot: they are replayed, and their digests compared.
                for role in GROUPS:
                    os.kill(grouped.ranks_of(role)[1], signal.SIGKILL)
            losses[name] += train(training, 6, 10)
            samples[name] = draw(training)
    assert np.allclose(losses["group"], losses["single"], rtol=1e-5)
    assert losses["group"][0] == losses["single"][0]
    assert samples["group"][0] == samples["single"][0]
    assert np.allclose(samples["group"][1], samples["single"][1], atol=1e-3)
    log = (grouped.folder / "trainer.log").read_text()
    assert "run_diverged" not in log
    # Once at the start and once after the kill; a busy machine may lose a group for being silent too long, too.
    assert log.count("rank_ready") >= 2


def test_a_group_that_drains_ends_in_order(grouped: Cluster) -> None:
    """torchrun passes the signal on, rank 0 hands its runs over and ends the others, and the next group goes on."""
    with ServiceClient(grouped.gateway_address, grouped.new_tenant()) as service:
        training = service.create_lora_training_client("treadle/pip", rank=8, seed=4)
        before = train(training, 0, 3)
        for role in GROUPS:
            process = grouped.processes.pop(role)
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=WAIT_SECONDS)
            log = grouped.log_of(role)
            assert "draining" in log
            assert "rank_ended" in log
            assert "forcefully" not in log
            grouped.launch(role)
        after = train(training, 3, 6)
        assert len(draw(training)[0]) > 0
        assert after[-1] < before[0]


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_group(grouped: Cluster, tmp_path: Path) -> None:
    """Two nodes of one rank each, as the manifest starts them: none waits for ever for one that does not answer."""
    port = free_port()
    environment = grouped.environment("trainer") | {
        "TREADLE_TRAINER_LISTEN": "127.0.0.1:0",
        "TREADLE_TRAINER_ADVERTISE": "",
        "TREADLE_TRAINER_WORKER": "trainer-two-nodes",
        "TREADLE_TRAINER_RANK_TIMEOUT_SECONDS": "8",
    }
    logs = [tmp_path / f"{node}.log" for node in (0, 1)]
    nodes = [
        subprocess.Popen(
            group_command("trainer", 2, node, port, 1, "--shutdown-timeout=5"),
            env=environment, stdout=log.open("wb"), stderr=subprocess.STDOUT,
        )
        for node, log in enumerate(logs)
    ]  # fmt: skip
    try:
        deadline = time.monotonic() + START_SECONDS
        while "rank_ready" not in logs[1].read_text():
            assert time.monotonic() < deadline, logs[0].read_text()
            time.sleep(0.2)
        (child,) = Path(f"/proc/{nodes[1].pid}/task/{nodes[1].pid}/children").read_text().split()
        os.kill(int(child), signal.SIGSTOP)
        # Rank 0 has nothing to do, and finds out all the same.
        assert nodes[0].wait(timeout=WAIT_SECONDS) != 0
        assert "group_lost" in logs[0].read_text()
        os.kill(int(child), signal.SIGCONT)
        # The other one finds rank 0 gone.
        assert nodes[1].wait(timeout=WAIT_SECONDS) != 0
    finally:
        for node in nodes:
            node.kill()
