"""A real store process, killed at any moment: what it acknowledged is there."""

import asyncio
import hashlib
import signal
from pathlib import Path

import grpc
import pytest

from tests.store.conftest import Caller, entry
from tests.store.process import StoreProcess
from treadle_service.channels import open_channel


@pytest.fixture
def process(tmp_path: Path):
    store = StoreProcess(tmp_path)
    store.start()
    yield store
    if store.process is not None and store.process.poll() is None:
        store.end(signal.SIGKILL)


async def write_until_it_dies(store: Caller, run: str, epoch: int, first: int, acknowledged: list[int]) -> None:
    """Appends and commits one operation after the other, and a blob now and then, until the store is gone."""
    seq = first
    while True:
        content = b"blob %d" % seq
        try:
            assert await store.write(entry(run, epoch, [seq], [seq])) == [""]
            if seq % 5 == 0:
                await store.put_blob(content)
        except grpc.aio.AioRpcError:
            return
        acknowledged.append(seq)
        seq += 1


async def test_acknowledged_writes_survive_kill_9(process: StoreProcess) -> None:
    """Three kills under load: no acknowledged operation, result or blob is missing, none is there twice."""
    run, total = "", 0
    for kill in range(3):
        async with open_channel(await process.address()) as channel:
            store = Caller(channel)
            run = run or await store.new_run()
            epoch = await store.claim(run)
            header, operations = await store.recover(run, epoch)
            assert header.last_seq >= total
            assert [o.seq for o in operations] == list(range(1, header.last_seq + 1))
            assert all(o.result == b"result %d" % o.seq for o in operations)
            for seq in range(5, total + 1, 5):
                assert await store.put_blob(b"blob %d" % seq) == hashlib.sha256(b"blob %d" % seq).hexdigest()
            acknowledged: list[int] = []
            writing = asyncio.create_task(write_until_it_dies(store, run, epoch, header.last_seq + 1, acknowledged))
            while len(acknowledged) < 20 * (kill + 1):
                await asyncio.sleep(0.005)
            await asyncio.to_thread(process.end, signal.SIGKILL)
            await writing
            total = acknowledged[-1]
        process.start()
    async with open_channel(await process.address()) as channel:
        store = Caller(channel)
        header, operations = await store.recover(run, await store.claim(run))
        assert header.last_seq in (total, total + 1)
        assert [o.seq for o in operations] == list(range(1, header.last_seq + 1))


async def test_sigterm_ends_cleanly(process: StoreProcess) -> None:
    """The store drains and exits with 0."""
    await process.address()
    assert await asyncio.to_thread(process.end, signal.SIGTERM) == 0


async def test_two_stores_cannot_share_a_folder(process: StoreProcess, tmp_path: Path) -> None:
    """The second one says why it does not start."""
    await process.address()
    second = StoreProcess(tmp_path)
    second.address_file = tmp_path / "second-address"
    second.start()
    assert second.process is not None
    assert await asyncio.to_thread(second.process.wait, 30) != 0
    assert "another store uses" in (tmp_path / "log").read_text()
