"""Unnamed revisions are collected when nobody can be expected to ask for them, and not before."""

import hashlib
from functools import partial

import pytest

from tests.store.conftest import reason_of
from tests.store.test_adapters import get
from tests.store.test_revisions import read, watching
from treadle.internal.v1 import journal_pb2
from treadle.names import AdapterName
from treadle.v1 import adapters_pb2, types_pb2
from treadle_store.adapters import record_adapter
from treadle_store.blobs import LocalBlobs
from treadle_store.database import Database
from treadle_store.revision_feed import RevisionFeed
from treadle_store.settings import StoreSettings
from treadle_store.unnamed import UnnamedRevisions

IDLE_SECONDS = 600.0


@pytest.fixture
def settings(settings: StoreSettings) -> StoreSettings:
    return settings.model_copy(update={"unnamed_kept": 2, "unnamed_period_seconds": 0.02})


async def save(store, run: str, epoch: int, seq: int, *, name: str = "") -> str:
    """Saves other content for each seq, unnamed unless a name is given; returns the revision."""
    content = b"weights %d" % seq
    address = await store.put_blob(content)
    full = f"{run}/revisions/{name or 'w-' + address[:12]}"
    adapter = adapters_pb2.Adapter(
        name=full,
        base="treadle/pip",
        lora=types_pb2.LoraConfig(rank=4, alpha=32),
        step=seq,
        files=[adapters_pb2.AdapterFile(path="adapter_model.safetensors", size=len(content), sha256=address)],
        unnamed=not name,
    )
    await store.journal.RecordAdapter(journal_pb2.RecordAdapterRequest(run=run, epoch=epoch, adapter=adapter, seq=seq))
    return full


async def names(store, run: str) -> set[str]:
    answer = await store.tenant("acme").adapters.ListRevisions(adapters_pb2.ListRevisionsRequest(run=run))
    return {revision.name for revision in answer.revisions}


async def next_removed(call) -> str:
    while not (event := await read(call)).removed:
        pass
    return event.removed


async def test_old_unused_ones_go_and_watchers_hear_of_it(store, clock):
    """The newest two, the named one and the one in use stay; the others vanish from lists and from samplers."""
    run = await store.new_run()
    epoch = await store.claim(run)
    async with watching(store) as (call, _):
        old = [await save(store, run, epoch, seq) for seq in (1, 2, 3)]
        final = await save(store, run, epoch, 4, name="final")
        newest = [await save(store, run, epoch, seq) for seq in (5, 6)]
        clock.advance(IDLE_SECONDS - 60)
        await store.journal.LookupAdapter(journal_pb2.LookupAdapterRequest(name=old[1]))
        clock.advance(120)
        assert {await next_removed(call) for _ in range(2)} == {old[0], old[2]}
    assert await names(store, run) == {old[1], final, *newest}
    assert await reason_of(get(store.tenant("acme"), old[0])) == "ADAPTER_NOT_FOUND"
    assert not (await get(store.tenant("acme"), final)).revision.unnamed


async def test_nothing_stays_of_a_deleted_run_for_good(store, clock):
    """Its newest unnamed revisions go when they are idle, too; the named one stays."""
    run = await store.new_run()
    epoch = await store.claim(run)
    async with watching(store) as (call, _):
        unnamed = await save(store, run, epoch, 1)
        final = await save(store, run, epoch, 2, name="final")
        await store.journal.RemoveRun(journal_pb2.RemoveRunRequest(run=run))
        clock.advance(IDLE_SECONDS + 60)
        assert await next_removed(call) == unnamed
    assert await names(store, run) == {final}


async def test_saved_again_it_counts_from_then_and_a_name_keeps_it(store, clock):
    """The same content once more renews it; the same content under its name chosen by the user makes it permanent."""
    run = await store.new_run()
    epoch = await store.claim(run)
    first = await save(store, run, epoch, 1)
    kept = await save(store, run, epoch, 2)
    await save(store, run, epoch, 2, name=kept.rpartition("/")[2])
    async with watching(store) as (call, _):
        clock.advance(IDLE_SECONDS - 60)
        await save(store, run, epoch, 1)
        doomed = await save(store, run, epoch, 3)
        for seq in (4, 5):
            await save(store, run, epoch, seq)
        clock.advance(120)
        await store.journal.LookupAdapter(journal_pb2.LookupAdapterRequest(name=first))
        clock.advance(IDLE_SECONDS - 60)
        assert await next_removed(call) == doomed
    assert {first, kept} <= await names(store, run)


async def test_a_run_that_starts_from_one_keeps_it(store, clock):
    """Until the new run has a snapshot of its own, its state begins there."""
    run = await store.new_run()
    epoch = await store.claim(run)
    origin = await save(store, run, epoch, 1)
    others = [await save(store, run, epoch, seq) for seq in (2, 3, 4)]
    await store.new_run(from_adapter=origin, lora=types_pb2.LoraConfig())
    async with watching(store) as (call, _):
        clock.advance(IDLE_SECONDS + 60)
        assert await next_removed(call) == others[0]
    assert origin in await names(store, run)


def put(blobs: LocalBlobs, content: bytes) -> adapters_pb2.AdapterFile:
    address = hashlib.sha256(content).hexdigest()
    with blobs.open_writer(address, len(content)) as writer:
        writer.write(content)
        writer.finish()
    return adapters_pb2.AdapterFile(path=f"{address[:8]}.bin", size=len(content), sha256=address)


@pytest.mark.parametrize(("idle_seconds", "freed"), [(0.0, True), (60.0, False)])
async def test_blobs_go_with_the_last_revision_that_has_them(
    database: Database, clock, tmp_path, idle_seconds: float, freed: bool
):
    """What another row names stays, and so does what somebody stored a moment ago, perhaps to record it next."""
    blobs = LocalBlobs(tmp_path / "blobs")
    own, shared = put(blobs, b"own"), put(blobs, b"shared")
    unnamed = UnnamedRevisions(database, blobs, RevisionFeed(), clock, num_kept=1, idle_seconds=idle_seconds)
    for revision, files in (("w-1", [own, shared]), ("final", [shared])):
        adapter = adapters_pb2.Adapter(base="b", files=files, unnamed=revision != "final")
        name = AdapterName("acme", "gone", "revisions", revision)
        await database.write(partial(record_adapter, name=name, adapter=adapter, seq=1, now_us=clock()))
    clock.advance(61)
    assert await unnamed.collect() == 1
    assert (blobs.size_of(own.sha256) is None) == freed
    assert blobs.size_of(shared.sha256) is not None
    assert await unnamed.collect() == 0
