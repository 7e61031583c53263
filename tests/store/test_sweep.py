"""Garbage collection keeps what rows name and removes the rest."""

import asyncio

from tests.store.conftest import Caller, entry, serve
from treadle.internal.v1 import journal_pb2
from treadle.v1 import adapters_pb2
from treadle_store.backends import open_blobs, open_database
from treadle_store.sweep import Sweeper


async def make_blobs(store: Caller) -> tuple[dict[str, str], str]:
    """Returns blobs by what names them, and the revision's name."""
    run = await store.new_run()
    epoch = await store.claim(run)
    used = {kind: await store.put_blob(kind.encode()) for kind in ("payload", "snapshot", "adapter", "nothing")}
    first, second = entry(run, epoch, [1], [1]), entry(run, epoch, [2])
    second.appends[0].payload_sha256 = used["payload"]
    await store.write(first, second)
    saved = journal_pb2.Snapshot(seq=1, sha256=used["snapshot"], size=len("snapshot"))
    await store.journal.WriteSnapshot(journal_pb2.WriteSnapshotRequest(run=run, epoch=epoch, snapshot=saved))
    file = adapters_pb2.AdapterFile(path="adapter_config.json", size=len("adapter"), sha256=used["adapter"])
    adapter = adapters_pb2.Adapter(name=f"{run}/revisions/v1", base="treadle/pip", files=[file])
    await store.journal.RecordAdapter(journal_pb2.RecordAdapterRequest(run=run, epoch=epoch, adapter=adapter, seq=1))
    return used, adapter.name


async def test_only_unused_blobs_are_swept(settings, clock):
    """Blobs of payloads, snapshots and adapters stay; a deleted adapter's blob goes after its grace."""
    async with serve(settings, clock) as store:
        used, name = await make_blobs(store)
    database, blobs = open_database(settings), open_blobs(settings)
    assert await Sweeper(database, blobs, clock, grace_seconds=3600).sweep(60) == 0
    sweeper = Sweeper(database, blobs, clock, grace_seconds=1.5)
    await asyncio.sleep(2.6)  # a bucket's times are whole seconds
    assert await sweeper.sweep(60) == 1
    assert sorted(blobs.addresses()) == sorted(set(used.values()) - {used["nothing"]})
    database.close()
    async with serve(settings, clock) as store:
        await store.tenant("acme").adapters.DeleteRevision(adapters_pb2.DeleteRevisionRequest(name=name))
    database = open_database(settings)
    sweeper = Sweeper(database, blobs, clock, grace_seconds=1.5)
    assert await sweeper.sweep(60) == 0
    clock.advance(61)
    assert await sweeper.sweep(60) == 1
    assert sorted(blobs.addresses()) == sorted([used["payload"], used["snapshot"]])
    database.close()
