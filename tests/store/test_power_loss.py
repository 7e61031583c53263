"""The power fails at any moment: no acknowledged write is missing, no row names a blob that is not whole."""

import random
import signal
from pathlib import Path
from typing import NamedTuple

from tests.store.conftest import Caller
from tests.store.process import StoreProcess
from tests.store.test_maintenance import operation, result, snapshot
from tests.support.faultfs import FaultLayer, power_loss
from treadle.internal.v1 import journal_pb2
from treadle.names import parse_run
from treadle.v1 import adapters_pb2
from treadle_service.channels import open_channel
from treadle_store import journal
from treadle_store.blobs import LocalBlobs
from treadle_store.engines import open_engines
from treadle_store.fsck import check_store

NUM_STEPS = 40
NUM_LOSSES = 40


class Promise(NamedTuple):
    """What was acknowledged before a position of the record."""

    position: int
    last_seq: int
    snapshot_seq: int
    num_adapters: int


async def work(store: Caller, layer: FaultLayer) -> tuple[str, list[Promise]]:
    """Appends, commits, stores long payloads, snapshots and adapters, acks; notes what each answer promised."""
    run = await store.new_run()
    epoch = await store.claim(run)
    promises = [Promise(layer.position, 0, 0, 0)]
    covered = num_adapters = 0
    for seq in range(1, NUM_STEPS + 1):
        append = operation(seq)
        if seq % 6 == 0:
            payload_sha256 = await store.put_blob(append.payload)
            append = journal_pb2.JournalAppend(seq=seq, digest=append.digest, payload_sha256=payload_sha256)
        entry = journal_pb2.JournalEntry(run=run, epoch=epoch, appends=[append], commits=[result(seq)])
        entry.acked_seq = max(0, seq - 3)
        assert await store.write(entry) == [""]
        if seq % 5 == 0:
            await snapshot(store, run, epoch, seq, b"state %d " % seq * 3000)
            covered = seq
        if seq % 10 == 0:
            content = b"weights %d " % seq * 2000
            file = adapters_pb2.AdapterFile(path="adapter_model.safetensors", size=len(content))
            file.sha256 = await store.put_blob(content)
            adapter = adapters_pb2.Adapter(name=f"{run}/revisions/s{seq}", base="treadle/pip", files=[file])
            request = journal_pb2.RecordAdapterRequest(run=run, epoch=epoch, adapter=adapter, seq=seq)
            await store.journal.RecordAdapter(request)
            num_adapters += 1
        promises.append(Promise(layer.position, seq, covered, num_adapters))
    return run, promises


def check_image(folder: Path, run: str, promise: Promise) -> None:
    """Opens what the power loss left and compares it with what was promised."""
    engines = open_engines(f"sqlite:///{folder / 'store.db'}")
    try:
        report = check_store(engines, LocalBlobs(folder / "blobs"))
        assert report.problems == []
        assert report.counts["adapters"] >= promise.num_adapters
        name = parse_run(run)
        with engines.reader.begin() as connection:
            header = journal.recovery_header(connection, name, 1)
            tail = journal.recovery_page(connection, name, 1, header.snapshot.seq, 1000)
        assert header.last_seq >= promise.last_seq
        assert header.snapshot.seq >= promise.snapshot_seq
        assert [op.seq for op in tail] == list(range(header.snapshot.seq + 1, header.last_seq + 1))
    finally:
        engines.dispose()


async def test_a_power_loss_takes_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    """A real store over a recording layer; its folder as forty power losses may leave it, torn writes included."""
    layer = FaultLayer(tmp_path, tmp_path / "data")
    process = StoreProcess(tmp_path, layer.environment)
    process.start()
    async with open_channel(await process.address()) as channel:
        run, promises = await work(Caller(channel), layer)
    process.end(signal.SIGKILL)
    chance = random.Random(0)
    for i in range(NUM_LOSSES):
        position = chance.randint(promises[0].position, layer.position)
        promise = max((p for p in promises if p.position <= position), key=lambda p: p.position)
        folder = tmp_path / f"image-{i}"
        folder.mkdir()
        power_loss(layer, position, folder, chance)
        check_image(folder, run, promise)
