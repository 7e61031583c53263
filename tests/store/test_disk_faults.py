"""A full, read-only or failing disk: clear answers within the deadline, nothing promised is lost, and it passes."""

import errno
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.store.conftest import Caller, reason_of
from tests.store.process import StoreProcess
from tests.store.test_maintenance import operation, result, snapshot
from tests.support.faultfs import FaultLayer
from treadle.internal.v1 import blobs_pb2, journal_pb2
from treadle_service.channels import open_channel
from treadle_store.blobs import LocalBlobs
from treadle_store.engines import open_engines
from treadle_store.fsck import check_store

FAULTS = {
    "a full disk": {"write": errno.ENOSPC},
    "a disk that cannot write": {"write": errno.EIO},
    "a disk that cannot sync": {"sync": errno.EIO},
    "a disk that cannot write, sync or rename": {"write": errno.EIO, "sync": errno.EIO, "name": errno.EIO},
    "a read-only folder": {"open": errno.EROFS, "write": errno.EROFS, "name": errno.EROFS},
}


@pytest.fixture
async def layered(tmp_path: Path) -> AsyncIterator[tuple[FaultLayer, Caller]]:
    """A store process over a layer that can fail, and a caller."""
    layer = FaultLayer(tmp_path, tmp_path / "data", recording=False)
    process = StoreProcess(tmp_path, layer.environment)
    process.start()
    async with open_channel(await process.address()) as channel:
        yield layer, Caller(channel)
    assert process.end(signal.SIGTERM) == 0


async def test_a_failing_disk_gives_clear_answers_and_passes(layered, tmp_path: Path) -> None:
    """Each fault in turn, on the journal and on blobs; reads go on; afterwards the same calls succeed."""
    layer, store = layered
    run = await store.new_run()
    epoch = await store.claim(run)
    seq = 0
    for name, numbers in FAULTS.items():
        for _ in range(3):
            seq += 1
            entry = journal_pb2.JournalEntry(run=run, epoch=epoch, appends=[operation(seq)], commits=[result(seq)])
            request = journal_pb2.WriteJournalRequest(entries=[entry])
            layer.fail(**numbers)
            assert (name, await reason_of(store.journal.WriteJournal(request, timeout=10))) == (name, "UNAVAILABLE")
            content = f"{name} {seq}".encode() * 1000
            assert (name, await blob_reason(store, content)) == (name, "UNAVAILABLE")
            header, operations = await store.recover(run, epoch)
            assert (header.last_seq, len(operations)) == (seq - 1, seq - 1)
            layer.heal()
            # The same again: what failed took no effect, or took all of it.
            assert await store.write(entry) == [""]
            await store.put_blob(content)
        await snapshot(store, run, epoch, seq, content)
        header, operations = await store.recover(run, epoch)
        assert [op.seq for op in operations] == list(range(1, seq + 1))
    engines = open_engines(f"sqlite:///{tmp_path / 'data' / 'store.db'}")
    blobs = LocalBlobs(tmp_path / "data" / "blobs", beside_a_store=True)
    assert check_store(engines, blobs).problems == []
    engines.dispose()
    # What could not even be removed is removed by a sweep.
    blobs.tidy(0)
    assert list((tmp_path / "data" / "blobs" / "incoming").iterdir()) == []


async def blob_reason(store: Caller, content: bytes) -> str:
    """Puts a blob and returns the reason why it was refused."""

    async def put() -> None:
        await store.put_blob(content)

    return await reason_of(put())


async def test_a_store_does_not_start_on_a_folder_that_it_cannot_write(tmp_path: Path) -> None:
    """It says so and exits; once the folder can be written it starts."""
    layer = FaultLayer(tmp_path, tmp_path / "data", recording=False)
    (tmp_path / "data").mkdir()
    layer.fail(open=errno.EROFS, write=errno.EROFS, name=errno.EROFS)
    process = StoreProcess(tmp_path, layer.environment)
    process.start()
    assert process.process is not None
    assert process.process.wait(30) == 1
    log = (tmp_path / "log").read_text()
    assert "cannot" in log
    assert "Traceback" not in log
    layer.heal()
    process.start()
    async with open_channel(await process.address()) as channel:
        stat = await Caller(channel).blobs.StatBlob(blobs_pb2.StatBlobRequest(sha256="0" * 64))
        assert not stat.complete
    assert process.end(signal.SIGTERM) == 0
