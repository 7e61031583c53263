"""Fixtures that every test may use."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.support.cluster import Cluster
from tests.support.postgres import PostgresServer
from tests.support.s3 import S3Server

# How long an example takes says nothing on a shared machine.
settings.register_profile("treadle", deadline=None)
settings.load_profile("treadle")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Four running services on the tiny base, shared by the whole session; tests make tenants of their own."""
    running = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        running.start()
        yield running
    finally:
        running.close()


@pytest.fixture
def own_cluster(tmp_path: Path) -> Iterator[Cluster]:
    """Four services of this test's own, not started, so that it may break them."""
    running = Cluster(tmp_path / "cluster")
    running.folder.mkdir()
    try:
        yield running
    finally:
        running.close()


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A running PostgreSQL server, shared by the whole session; tests make databases of their own."""
    server = PostgresServer()
    try:
        server.create()
        yield server
    finally:
        server.close()


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """A running S3 server, shared by the whole session; tests make buckets of their own."""
    server = S3Server()
    try:
        server.wait_ready()
        yield server
    finally:
        server.close()
