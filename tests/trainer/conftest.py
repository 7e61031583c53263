"""A store and a trainer for one test."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio

from tests.trainer.harness import Bench, serving


@pytest_asyncio.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    """A running store and trainer on Pip."""
    async with serving(tmp_path) as running:
        yield running
