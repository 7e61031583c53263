"""Workers that join and leave under load: runs move to them and away, no call fails, and no number changes."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.support.cluster import ROLES, Cluster
from tests.support.users import User, reinforce, supervise, wait_for_steps
from treadle.internal.v1 import sampler_pb2, sampler_pb2_grpc, trainer_pb2, trainer_pb2_grpc
from treadle_service.channels import internal_metadata

SETTINGS = {
    "TREADLE_TRAINER_REBALANCE_SECONDS": "0.3",
    "TREADLE_TRAINER_REBALANCE_STAY_SECONDS": "1",
    "TREADLE_TRAINER_LEASE_SECONDS": "4",
    "TREADLE_SAMPLER_HEARTBEAT_SECONDS": "0.5",
}
PATIENCE_SECONDS = 120.0


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """One of each service, and room for a second trainer and sampler."""
    cluster = Cluster(tmp_path / "cluster", settings=SETTINGS, trainers=2, samplers=2, forked=True)
    try:
        cluster.start(*ROLES)
        yield cluster
    finally:
        cluster.close()


def ask(cluster: Cluster, name: str) -> Any:  # Any: the status of a trainer or of a sampler.
    """Returns a worker's status."""
    with grpc.insecure_channel(cluster.addresses[name]) as channel:
        metadata = internal_metadata(cluster.token)
        if name.startswith("trainer"):
            trainer = trainer_pb2_grpc.TrainerServiceStub(channel)
            return trainer.GetTrainerStatus(trainer_pb2.GetTrainerStatusRequest(), metadata=metadata, timeout=10)
        sampler = sampler_pb2_grpc.SamplerServiceStub(channel)
        return sampler.GetSamplerStatus(sampler_pb2.GetSamplerStatusRequest(), metadata=metadata, timeout=10)


def wait_until(holds: Callable[[], bool]) -> None:
    """Waits until something holds."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.timeout(400)
def test_workers_join_and_leave_under_load(cluster: Cluster) -> None:
    """Three loops that queue ahead and one that samples from itself, while all the work goes to workers that are new.

    A loop ends at the first call that raises, so that they go on says that none did.
    """
    loops = (supervise, supervise, supervise, reinforce)
    users = [
        User(loop, seed, cluster.gateway_address, cluster.new_tenant()).start() for seed, loop in enumerate(loops, 1)
    ]
    wait_for_steps(users, 2)
    # A trainer that dies when it claims the first run that it has accepted: the run goes back.
    cluster.launch("trainer-1", allow_failpoints="true", failpoints="trainer.claim.before=kill")
    wait_until(lambda: cluster.processes["trainer-1"].poll() is not None)
    wait_for_steps(users, 2)
    cluster.launch("trainer-1")
    cluster.launch("sampler-1")
    cluster.wait_ready(["trainer-1", "sampler-1"])
    # Nobody has told any run to move.
    wait_until(lambda: ask(cluster, "trainer-1").num_passes > 0)
    wait_for_steps(users, 2)
    assert ask(cluster, "trainer").resident_runs
    for leaving in ("sampler", "trainer"):
        assert cluster.stop(leaving) == 0
        wait_for_steps(users, 2)
    assert ask(cluster, "sampler-1").num_tokens > 0
    assert len(ask(cluster, "trainer-1").resident_runs) == len(loops)
    seen = [user.finish() for user in users]
    assert seen == [user.undisturbed() for user in users]
