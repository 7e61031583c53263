"""Faults at random over real processes: kills, freezes and cut connections, from a seed.

Knows the cluster and nothing of the tenants that work on it.
"""

import random
import time
from collections import Counter
from dataclasses import dataclass, field

from tests.support.cluster import Cluster

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
