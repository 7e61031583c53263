"""Tenants that come and go for as long as one likes, and what their work leaves behind in the services' processes.

Each tenant lives half a minute: it trains, publishes, samples, saves, and is deleted with all that it made; then the
next comes. Every process's memory, open files and threads are sampled meanwhile. Knows nothing of faults.
"""

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import grpc
import psutil

from tests.support.cluster import Cluster
from tests.support.users import Loop, User, reinforce, supervise
from treadle import ServiceClient
from treadle.internal.v1 import sampler_pb2, sampler_pb2_grpc, trainer_pb2, trainer_pb2_grpc
from treadle_service.channels import internal_metadata

SETTINGS = {
    "TREADLE_TRAINER_SNAPSHOT_EVERY_STEPS": "4",
    "TREADLE_TRAINER_PARK_SECONDS": "1",
    "TREADLE_TRAINER_IDLE_SECONDS": "10",
}
LOOPS: tuple[Loop, ...] = (supervise, supervise, reinforce)
LIFE_SECONDS = 30.0
SAMPLE_SECONDS = 5.0
QUIET_SECONDS = 60.0


@dataclass(frozen=True)
class Usage:
    """What one process has of its machine at one moment."""

    memory: int
    """Bytes of resident anonymous pages."""
    files: int
    threads: int


@dataclass
class Soak:
    """Samples of each process in order of time, and what the workers still held in the end."""

    samples: dict[str, list[Usage]] = field(default_factory=dict)
    num_lives: int = 0
    num_steps: int = 0
    left: dict[str, int] = field(default_factory=dict)
    """Runs, queued operations and sequences that are still there when nobody works."""

    def fifths(self, name: str) -> list[Usage]:
        """Returns a process's median use in each fifth of the time."""
        samples = self.samples[name]
        ends = [len(samples) * number // 5 for number in range(6)]
        return [_median(samples[start:stop]) for start, stop in itertools.pairwise(ends)]


def soak(folder: Path, seconds: float) -> Soak:
    """Has three tenants at a time come and go for so long."""
    found = Soak()
    with _cluster(folder) as cluster:
        keys = [cluster.new_tenant() for _ in LOOPS]
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            users = [
                User(loop, found.num_lives + place, cluster.gateway_address, key).start()
                for place, (loop, key) in enumerate(zip(LOOPS, keys, strict=True))
            ]
            _watch(cluster, found, min(LIFE_SECONDS, until - time.monotonic()))
            for user in users:
                user.finish()
                _forget_all(user)
            found.num_lives += len(users)
            found.num_steps += sum(user.num_steps for user in users)
        found.left = _wait_until_quiet(cluster)
    return found


@contextmanager
def _cluster(folder: Path) -> Iterator[Cluster]:
    cluster = Cluster(folder, settings=SETTINGS, trainers=2, forked=True)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.close()


def _watch(cluster: Cluster, found: Soak, seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        time.sleep(min(SAMPLE_SECONDS, max(0.0, until - time.monotonic())))
        for name, process in cluster.processes.items():
            found.samples.setdefault(name, []).append(_usage(process.pid))


def _usage(pid: int) -> Usage:
    process = psutil.Process(pid)
    # Anonymous pages, with those still shared with the process that it was forked from. Pages of files do not count:
    # whether they are a process's own depends on who else has the same libraries open.
    status = Path(f"/proc/{pid}/status").read_text()
    memory = 1024 * int(status.partition("RssAnon:")[2].split()[0])
    return Usage(memory, process.num_fds(), process.num_threads())


def _median(samples: list[Usage]) -> Usage:
    return Usage(
        int(median(usage.memory for usage in samples)),
        int(median(usage.files for usage in samples)),
        int(median(usage.threads for usage in samples)),
    )


def _forget_all(user: User) -> None:
    """Deletes what a tenant made, as somebody does who has finished."""
    with ServiceClient(user.address, user.key) as service:
        for run in service.list_runs():
            for saved in (*service.list_checkpoints(run.name), *service.list_revisions(run.name)):
                service.delete_adapter(saved.name)
            service.delete_run(run.name)


def _wait_until_quiet(cluster: Cluster) -> dict[str, int]:
    """Waits until the workers hold nothing of anybody, at most a minute; returns what they hold then."""
    until = time.monotonic() + QUIET_SECONDS
    while any((left := _held(cluster)).values()) and time.monotonic() < until:
        time.sleep(0.5)
    return left


def _held(cluster: Cluster) -> dict[str, int]:
    metadata = internal_metadata(cluster.token)
    held = {"runs": 0, "queued operations": 0}
    for name in cluster.names:
        if not name.startswith("trainer"):
            continue
        with grpc.insecure_channel(cluster.addresses[name]) as channel:
            trainer = trainer_pb2_grpc.TrainerServiceStub(channel)
            status = trainer.GetTrainerStatus(trainer_pb2.GetTrainerStatusRequest(), metadata=metadata, timeout=10)
            held["runs"] += len(status.resident_runs)
            held["queued operations"] += status.queued_operations
    with grpc.insecure_channel(cluster.addresses["sampler"]) as channel:
        sampler = sampler_pb2_grpc.SamplerServiceStub(channel)
        decoding = sampler.GetSamplerStatus(sampler_pb2.GetSamplerStatusRequest(), metadata=metadata, timeout=10)
    return held | {"sequences": decoding.active_sequences + decoding.waiting_sequences}
