"""Fixtures of the tests of what an operator deploys and watches."""

from collections.abc import Iterator

import pytest

from tests.deploy.observed import Observed, observed_deployment


@pytest.fixture(scope="session")
def observed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Observed]:
    """A watched deployment on which one loop has run, shared by the tests of this folder."""
    with observed_deployment(tmp_path_factory.mktemp("observed")) as deployment:
        yield deployment
