"""A deployment that programs written for Tinker are pointed at, and the real SDK pointed at it."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.cluster import Cluster

# The SDK and the cookbook look for tokenizers on a hub before they look at what they were told.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TINKER_TELEMETRY", "0")

ALIAS = "Qwen/Qwen3-8B-Base"
BASE = "treadle/pip"
ALIASES = {"TREADLE_GATEWAY_MODEL_ALIASES": json.dumps({ALIAS: BASE})}


def sdk(cluster: Cluster, key: str | None = None, **options: object):
    """Returns the real SDK's client, as a program with two environment variables would make it."""
    import tinker

    chosen = key or cluster.new_tenant()
    return tinker.ServiceClient(base_url=f"http://{cluster.http_address}", api_key=f"tml-{chosen}", **options)


def rest(cluster: Cluster, key: str | None = None):
    """Returns the real SDK's client of the catalog."""
    import tinker

    chosen = key or cluster.new_tenant()
    return tinker.RestClient(base_url=f"http://{cluster.http_address}", api_key=f"tml-{chosen}")


@pytest.fixture(scope="package")
def tinker_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Four services with an alias for the tiny base, shared by the tests of this folder; tenants are their own."""
    running = Cluster(tmp_path_factory.mktemp("tinker"), settings=ALIASES)
    try:
        running.start()
        yield running
    finally:
        running.close()


@pytest.fixture
def make_cluster(tmp_path: Path) -> Iterator[Callable[..., Cluster]]:
    """Makes deployments of a test's own, which it may break."""
    made: list[Cluster] = []

    def make(**settings: str) -> Cluster:
        made.append(Cluster(tmp_path / f"cluster-{len(made)}", settings=ALIASES | settings))
        made[-1].start()
        return made[-1]

    try:
        yield make
    finally:
        for cluster in made:
            cluster.close()
