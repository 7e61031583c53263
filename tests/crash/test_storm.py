"""Processes killed, frozen and cut off at random under three tenants' load: in the end nobody can tell."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import psutil
import pytest

from tests.crash.storm import Storm
from tests.support.cluster import Cluster
from tests.support.users import User, reinforce, supervise, wait_for_steps
from treadle.v1 import training_pb2, training_pb2_grpc

SETTINGS = {
    "TREADLE_TRAINER_LEASE_SECONDS": "1.5",
    "TREADLE_TRAINER_SNAPSHOT_EVERY_STEPS": "4",
    "TREADLE_SAMPLER_HEARTBEAT_SECONDS": "0.5",
}


@contextmanager
def fleet(folder: Path) -> Iterator[tuple[Cluster, list[User]]]:
    """Starts two trainers and one of each other service behind proxies, and three tenants: two SFT, one RL."""
    cluster = Cluster(folder / "cluster", settings=SETTINGS, trainers=2, forked=True, proxied=True)
    try:
        cluster.start()
        loops = (supervise, supervise, reinforce)
        yield (
            cluster,
            [
                User(loop, seed, cluster.gateway_address, cluster.new_tenant()).start()
                for seed, loop in enumerate(loops, 1)
            ],
        )
    finally:
        cluster.close()


def check_nothing_is_stuck(cluster: Cluster, users: list[User]) -> None:
    """Compares what the tenants saw with undisturbed loops, and asks every run of theirs for its last result."""
    wait_for_steps(users, 2)
    stormy = [user.finish() for user in users]
    assert stormy == [user.undisturbed() for user in users]
    with grpc.insecure_channel(cluster.gateway_address) as channel:
        training = training_pb2_grpc.TrainingServiceStub(channel)
        for user in users:
            metadata = (("authorization", f"Bearer {user.key}"),)
            runs = training.ListRuns(training_pb2.ListRunsRequest(), metadata=metadata, timeout=10).runs
            assert len(runs) == 2
            for run in runs:
                assert run.state != training_pb2.RUN_STATE_DIVERGED
                assert run.next_seq > 1


@pytest.mark.timeout(300)
def test_twelve_random_kills_change_nothing(tmp_path: Path) -> None:
    """All numbers of all tenants equal those of undisturbed loops; freezes and cuts come on top of the kills."""
    with fleet(tmp_path) as (cluster, users):
        Storm(cluster, seed=3).rage(12)
        check_nothing_is_stuck(cluster, users)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [1, 2])
def test_forty_random_kills_change_nothing(tmp_path: Path, seed: int) -> None:
    """The same for longer."""
    with fleet(tmp_path) as (cluster, users):
        Storm(cluster, seed).rage(40)
        check_nothing_is_stuck(cluster, users)


@pytest.mark.slow
@pytest.mark.timeout(6 * 3600)
def test_a_thousand_random_kills_change_nothing(tmp_path: Path) -> None:
    """The long storm, in spells of fifty kills, each ended by the comparison."""
    num_kills = 0
    while num_kills < 1000:
        with fleet(tmp_path / str(num_kills)) as (cluster, users):
            storm = Storm(cluster, seed=num_kills)
            storm.rage(50)
            check_nothing_is_stuck(cluster, users)
        num_kills += storm.done["kill"]


@pytest.mark.slow
@pytest.mark.timeout(2 * 3600)
def test_an_hour_of_work_leaves_memory_handles_and_threads_as_they_were(tmp_path: Path) -> None:
    """After a warm-up, each process's memory, open files and threads stay within a tenth over all spells."""
    with fleet(tmp_path) as (cluster, users):
        wait_for_steps(users, 300)
        before = {name: usage(process.pid) for name, process in cluster.processes.items()}
        for _ in range(12):
            wait_for_steps(users, 300)
        after = {name: usage(process.pid) for name, process in cluster.processes.items()}
        for user in users:
            user.finish()
    for name, (memory, files, threads) in before.items():
        assert after[name][0] <= 1.1 * memory + 2**25, name
        assert after[name][1] <= files + 8, name
        assert after[name][2] <= threads + 2, name


def usage(pid: int) -> tuple[int, int, int]:
    """Returns a process's memory in bytes, its open files, and its threads."""
    process = psutil.Process(pid)
    return process.memory_info().rss, process.num_fds(), process.num_threads()
