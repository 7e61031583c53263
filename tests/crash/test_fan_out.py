"""kill -9 and long pauses while several trainers compute one user's big batch: its numbers are those of a calm life."""

import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest

from tests.support.cluster import Cluster
from tests.support.users import BASE, PATIENCE_SECONDS, last_id
from treadle import AdamParams, Datum, ModelInput, ServiceClient, TensorData
from treadle.internal.v1 import trainer_pb2, trainer_pb2_grpc
from treadle_service import failpoints
from treadle_service.channels import internal_metadata

TRAINERS = ("trainer", "trainer-1", "trainer-2")
Seen = list[tuple[object, ...]]


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster with three trainers of one base."""
    settings = {"TREADLE_TRAINER_LEASE_SECONDS": "1.5", "TREADLE_TRAINER_MEASURE_COST": "false"}
    # The trainer that holds the run keeps it.
    settings["TREADLE_TRAINER_REBALANCE_SECONDS"] = "0"
    cluster = Cluster(tmp_path_factory.mktemp("three") / "cluster", settings=settings, trainers=3, forked=True)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.close()


def big_batch(seed: int) -> list[Datum]:
    """Returns sequences that make about eight chunks."""
    generator = np.random.default_rng(seed)
    data = []
    for _ in range(16):
        tokens = generator.integers(3, 500, int(generator.integers(350, 500)))
        inputs = {
            "target_tokens": TensorData.from_numpy(tokens[1:]),
            "weights": TensorData.from_numpy(np.ones(len(tokens) - 1, dtype=np.float32)),
        }
        data.append(Datum(model_input=ModelInput.from_ints(tokens[:-1].tolist()), loss_fn_inputs=inputs))
    return data


def train(cluster: Cluster, key: str) -> Seen:
    """Makes a step of two big batches and one of one; returns losses, norms and the content of the weights."""
    with ServiceClient(cluster.gateway_address, api_key=key) as service:
        training = service.create_lora_training_client(BASE, rank=4, seed=1)
        seen: Seen = []
        for step in range(2):
            losses = [
                training.forward_backward(big_batch(2 * step + half), "cross_entropy") for half in range(2 - step)
            ]
            stepped = training.optim_step(AdamParams(learning_rate=5e-3, eps=1e-8)).result(PATIENCE_SECONDS)
            sums = tuple(loss.result(PATIENCE_SECONDS).metrics["loss:sum"] for loss in losses)
            seen.append((*sums, stepped.metrics["grad_norm:mean"], stepped.step))
        seen.append((last_id(training.save_weights_for_sampler().result(PATIENCE_SECONDS).path),))
        training.close()
        return seen


@pytest.fixture(scope="module")
def calm(three: Cluster) -> Seen:
    """What the user sees of a calm life, in which two trainers helped."""
    seen = train(three, three.new_tenant())
    assert sum(bool(num_passes(three, name)) for name in TRAINERS) == 3
    return seen


def num_passes(cluster: Cluster, name: str) -> int:
    """Returns the passes of a trainer since its start."""
    with grpc.insecure_channel(cluster.addresses[name]) as channel:
        stub = trainer_pb2_grpc.TrainerServiceStub(channel)
        request = trainer_pb2.GetTrainerStatusRequest()
        return int(stub.GetTrainerStatus(request, metadata=internal_metadata(cluster.token), timeout=10).num_passes)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "point",
    [
        # A helper that dies while it sends, and a home that dies in the midst of an operation; the others take as long.
        pytest.param(point, marks=[] if point in ("trainer.lent_piece", "trainer.add_lent") else [pytest.mark.slow])
        for point in failpoints.LENDING
    ],
)
def test_a_kill_between_trainers_changes_no_bit(three: Cluster, calm: Seen, point: str) -> None:
    """Every trainer that comes to the place dies there, helper or home; it is started again, and the run goes on."""
    for name in TRAINERS:
        three.kill(name)
        three.launch(name, allow_failpoints="true", failpoints=f"{point}=kill@2")
    three.wait_ready(TRAINERS)
    died: set[str] = set()
    with ThreadPoolExecutor(1) as pool:
        life = pool.submit(train, three, three.new_tenant())
        while not life.done():
            for name in TRAINERS:
                if three.processes[name].poll() is not None:
                    assert three.processes.pop(name).wait() == -signal.SIGKILL
                    died.add(name)
                    three.launch(name)
            time.sleep(0.05)
    assert life.result() == calm
    assert died
    three.wait_ready(TRAINERS)


@pytest.mark.timeout(200)
def test_a_helper_that_falls_silent_costs_time_alone(three: Cluster, calm: Seen) -> None:
    """What was lent to a trainer that stopped is computed elsewhere, and what it sends later is not added again."""
    three.kill("trainer-2")
    three.launch("trainer-2", allow_failpoints="true", failpoints="trainer.lent=sleep:20@1,trainer.lend=sleep:20@1")
    three.wait_ready(["trainer-2"])
    assert train(three, three.new_tenant()) == calm
