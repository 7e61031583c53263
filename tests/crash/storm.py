"""Faults at random over real processes under the load of three tenants: kills, freezes, cut connections, from a seed.

`endure` is one storm with its comparison; tests and `python -m bench storm` call it.
"""

import random
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from tests.support.cluster import Cluster
from tests.support.users import Seen, User, reinforce, supervise, wait_for_steps
from treadle.v1 import training_pb2, training_pb2_grpc

SETTINGS = {
    "TREADLE_TRAINER_LEASE_SECONDS": "1.5",
    "TREADLE_TRAINER_SNAPSHOT_EVERY_STEPS": "4",
    # A trainer that came back is given runs while the next fault is on its way.
    "TREADLE_TRAINER_REBALANCE_SECONDS": "0.3",
    "TREADLE_TRAINER_REBALANCE_STAY_SECONDS": "0.5",
    "TREADLE_SAMPLER_HEARTBEAT_SECONDS": "0.5",
}
FREEZE_SECONDS = (0.1, 2.5)
"""Shorter and longer than a lease of 1.5 s."""
CALM_SECONDS = (0.0, 0.6)


@dataclass
class Storm:
    """Faults against a cluster with proxies, one at a time; counts what it did."""

    cluster: Cluster
    seed: int
    done: Counter[str] = field(default_factory=Counter)

    def rage(self, kills: int) -> None:
        """Goes on until so many processes were killed; at the end all of them run."""
        rng = random.Random(self.seed)
        while self.done["kill"] < kills:
            name = rng.choice(self.cluster.names)
            fault = rng.choices(("kill", "freeze", "cut"), (5, 1, 2))[0]
            getattr(self, f"_{fault}")(name, rng)
            self.done[fault] += 1
            self.done[f"{fault} {name.partition('-')[0]}"] += 1
            time.sleep(rng.uniform(*CALM_SECONDS))
        self.cluster.wait_ready()

    def _kill(self, name: str, rng: random.Random) -> None:
        self.cluster.kill(name)
        # Half of the time nobody waits until it is back: the next fault finds it loading.
        time.sleep(rng.uniform(0.0, 0.3))
        self.cluster.launch(name)
        if rng.random() < 0.5:
            self.cluster.wait_ready([name])

    def _freeze(self, name: str, rng: random.Random) -> None:
        self.cluster.freeze(name)
        time.sleep(rng.uniform(*FREEZE_SECONDS))
        self.cluster.thaw(name)

    def _cut(self, name: str, rng: random.Random) -> None:
        for _ in range(rng.randint(1, 3)):
            self.cluster.proxies[name].cut()
            time.sleep(rng.uniform(0.0, 0.1))


@dataclass
class Report:
    """What a storm did and what came of it."""

    faults: Counter[str]
    num_acknowledged: int
    """Operations whose results the tenants got during the storm."""
    num_compared: int
    """Losses, samples, step counts and names of weights that were compared with an undisturbed life's."""
    differences: list[str]
    """The first number of each tenant that is not the undisturbed one."""
    num_moved: int
    """Runs that trainers handed to one with less to do."""
    stuck: list[str]
    """Runs with operations that have no result, and runs that diverged."""


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


def endure(folder: Path, seed: int, kills: int) -> Report:
    """Has three tenants work through a storm, then compares all that they saw with undisturbed loops."""
    with fleet(folder) as (cluster, users):
        storm = Storm(cluster, seed)
        storm.rage(kills)
        wait_for_steps(users, 2)
        stormy = [user.finish() for user in users]
        num_acknowledged = sum(run.last_done_seq for user in users for run in runs_of(cluster, user))
        num_moved = sum(
            log.read_text(errors="replace").count("run_moved") for log in cluster.folder.glob("trainer*.log")
        )
        calm = [user.undisturbed() for user in users]
        stuck = [message for user in users for message in stuck_runs(runs_of(cluster, user))]
    differences = [
        f"{user.loop.__name__} of seed {user.seed}: {found}"
        for user, seen, expected in zip(users, stormy, calm, strict=True)
        if (found := first_difference(seen, expected))
    ]
    return Report(storm.done, num_acknowledged, sum(map(len, calm)), differences, num_moved, stuck)


def first_difference(seen: Seen, expected: Seen) -> str:
    """Returns where two lives differ first, empty when they are the same."""
    for step, (one, other) in enumerate(zip(seen, expected, strict=False)):
        if one != other:
            return f"step {step} gave {one}, undisturbed {other}"
    return "" if len(seen) == len(expected) else f"{len(seen)} steps, undisturbed {len(expected)}"


def runs_of(cluster: Cluster, user: User) -> list[training_pb2.Run]:
    """Returns a tenant's runs, as the catalog has them."""
    with grpc.insecure_channel(cluster.gateway_address) as channel:
        metadata = (("authorization", f"Bearer {user.key}"),)
        training = training_pb2_grpc.TrainingServiceStub(channel)
        return list(training.ListRuns(training_pb2.ListRunsRequest(), metadata=metadata, timeout=10).runs)


def stuck_runs(runs: list[training_pb2.Run]) -> list[str]:
    """Returns what is wrong with the runs of a tenant that has ended its loop twice."""
    wrong = [f"{run.name} diverged" for run in runs if run.state == training_pb2.RUN_STATE_DIVERGED]
    wrong += [
        f"{run.name} has accepted {run.next_seq - 1} operations and finished {run.last_done_seq}"
        for run in runs
        if run.last_done_seq + 1 != run.next_seq or run.next_seq == 1
    ]
    return wrong if len(runs) == 2 else [*wrong, f"{len(runs)} runs instead of 2"]
