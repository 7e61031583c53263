"""The stream's own tasks, at moments that a run against services meets once in many."""

import asyncio

import pytest

from treadle.ledger import OperationLedger
from treadle.stream import OperationStream


class SilentCall:
    """A call that is still open and takes whatever is written."""

    async def write(self, frame: bytes) -> None:
        """Takes a frame."""


@pytest.mark.parametrize("turns", range(6))
async def test_a_writer_ends_although_something_comes_as_it_is_cancelled(turns: int) -> None:
    """The reader's last act is to wake the writer; however many turns of the loop later it is told to end, it does."""
    stream = OperationStream.__new__(OperationStream)
    stream._wake, stream._draining, stream._closing = asyncio.Event(), True, False
    stream._ledger = OperationLedger(1)
    stream._ledger.receive(1)
    assert stream._ledger.num_unacked
    writer = asyncio.create_task(stream._write(SilentCall()))
    for _ in range(10):
        await asyncio.sleep(0)
    stream._wake.set()
    for _ in range(turns):
        await asyncio.sleep(0)
    writer.cancel()
    await asyncio.wait({writer}, timeout=5)
    assert writer.cancelled()
