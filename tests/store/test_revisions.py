"""News of revisions: what watchers hear, in which order, and what they are told when they missed something."""

import asyncio
from contextlib import asynccontextmanager

from tests.store.conftest import TOKEN, reason_of
from tests.store.test_adapters import save
from treadle.internal.v1 import revisions_pb2, revisions_pb2_grpc, workers_pb2
from treadle.v1 import adapters_pb2, admin_pb2
from treadle_gateway.routing import WorkerTable, WorkerView, pick_sampler
from treadle_service.channels import internal_metadata
from treadle_service.principal import Principal
from treadle_store.revision_feed import RevisionFeed


@asynccontextmanager
async def watching(store, principal: Principal | None = None, **fields):
    """A stream of news that has begun, and its first message."""
    request = revisions_pb2.WatchRevisionsRequest(**{"base": "treadle/pip", "worker": "sampler-0", **fields})
    stub = revisions_pb2_grpc.RevisionServiceStub(store.channel)
    call = stub.WatchRevisions(request, metadata=internal_metadata(TOKEN, principal))
    try:
        yield call, await call.read()
    finally:
        call.cancel()


async def read(call):
    return await asyncio.wait_for(call.read(), 10)


async def live_samplers(store, *workers: str) -> None:
    for worker in workers:
        beat = workers_pb2.HeartbeatRequest(
            worker=admin_pb2.Worker(worker=worker, kind=admin_pb2.WORKER_KIND_SAMPLER, base="treadle/pip"),
            base=admin_pb2.BaseModel(name="treadle/pip"),
        )
        beat.ttl.FromSeconds(60)
        await store.workers.Heartbeat(beat)


async def test_watchers_hear_of_what_is_saved_and_deleted(store):
    """In order, with the files; checkpoints and other bases are no news."""
    run = await store.new_run()
    epoch = await store.claim(run)
    async with watching(store) as (call, first), watching(store, base="other/base") as (other, _):
        assert not first.started.resumed
        await save(store, run, epoch, f"{run}/checkpoints/c1")
        await save(store, run, epoch, f"{run}/revisions/v1")
        published = await read(call)
        assert published.published.name == f"{run}/revisions/v1"
        assert published.published.files[0].sha256
        await store.tenant("acme").adapters.DeleteRevision(
            adapters_pb2.DeleteRevisionRequest(name=f"{run}/revisions/v1")
        )
        removed = await read(call)
        assert removed.removed == f"{run}/revisions/v1"
        assert removed.position > published.position > first.position
        waiting = asyncio.create_task(other.read())
        await asyncio.sleep(0.05)
        assert not waiting.done()
        waiting.cancel()


async def test_a_broken_stream_goes_on_where_it_was(store):
    """What happened meanwhile comes; another feed's position is no place to go on from."""
    run = await store.new_run()
    epoch = await store.claim(run)
    async with watching(store) as (_, first):
        pass
    await save(store, run, epoch, f"{run}/revisions/v1")
    async with watching(store, feed=first.started.feed, after=first.position) as (call, again):
        assert again.started.resumed
        assert (await read(call)).published.name == f"{run}/revisions/v1"
    async with watching(store, feed="another", after=first.position) as (_, fresh):
        assert not fresh.started.resumed


async def test_news_names_the_sampler_that_will_be_asked(store):
    """Exactly one of the live samplers of the base, the same that every gateway picks for the run."""
    workers = ["sampler-0", "sampler-1", "sampler-2"]
    await live_samplers(store, *workers)
    run = await store.new_run()
    epoch = await store.claim(run)
    async with (
        watching(store, worker="sampler-0") as (a, _),
        watching(store, worker="sampler-1") as (b, _),
        watching(store, worker="sampler-2") as (c, _),
    ):
        await save(store, run, epoch, f"{run}/revisions/v1")
        preferred = [(await read(call)).preferred for call in (a, b, c)]
    table = WorkerTable().refreshed(WorkerView(w, "sampler", "treadle/pip", w) for w in workers)
    chosen = pick_sampler(table, "treadle/pip", f"{run}/revisions/v1", {})
    assert preferred == [worker == chosen for worker in workers]


async def test_what_is_on_its_way_is_told_to_the_same_samplers(store):
    """Of that base, as it was said, marked for the one that will be asked; a run's name must be one."""
    await live_samplers(store, "sampler-0", "sampler-1")
    run = await store.new_run()
    revision = revisions_pb2.RevisionArriving(run=run, file="0" * 32, size=10, config=b"{}")
    async with (
        watching(store, worker="sampler-0") as (a, _),
        watching(store, worker="sampler-1") as (b, _),
        watching(store, base="other/base") as (other, _),
    ):
        await announce(store, revision)
        heard = [await read(call) for call in (a, b)]
        assert [event.arriving for event in heard] == [revision, revision]
        assert sorted(event.preferred for event in heard) == [False, True]
        epoch = await store.claim(run)
        await save(store, run, epoch, f"{run}/revisions/v1")
        assert [(await read(call)).preferred for call in (a, b)] == [event.preferred for event in heard]
        waiting = asyncio.create_task(other.read())
        await asyncio.sleep(0.05)
        assert not waiting.done()
        waiting.cancel()
    assert await reason_of(announce(store, revisions_pb2.RevisionArriving(run="runs/r"))) == "BAD_NAME"


async def announce(store, revision: revisions_pb2.RevisionArriving, principal: Principal | None = None):
    request = revisions_pb2.AnnounceRevisionRequest(base="treadle/pip", revision=revision)
    stub = revisions_pb2_grpc.RevisionServiceStub(store.channel)
    return await stub.AnnounceRevision(request, metadata=internal_metadata(TOKEN, principal))


async def test_tenants_hear_and_say_nothing(store):
    """News is for services alone."""
    request = revisions_pb2.WatchRevisionsRequest(base="treadle/pip")
    stub = revisions_pb2_grpc.RevisionServiceStub(store.channel)
    tenant = Principal("acme", frozenset({"sample"}))
    assert (
        await reason_of(stub.WatchRevisions(request, metadata=internal_metadata(TOKEN, tenant))) == "PERMISSION_DENIED"
    )
    revision = revisions_pb2.RevisionArriving(run=await store.new_run())
    assert await reason_of(announce(store, revision, tenant)) == "PERMISSION_DENIED"


async def test_the_feed_forgets_but_says_so():
    """Beyond its bound the oldest events go, and a place before them is not held any more."""
    feed = RevisionFeed(max_events=3)
    for number in range(5):
        feed.removed("base", f"tenants/a/runs/r/revisions/{number}")
    assert [event.name[-1] for event in feed.after(2, "base")] == ["2", "3", "4"]
    assert feed.holds(2)
    assert not feed.holds(1)
    assert not feed.holds(6)
    assert feed.after(2, "other") == []
    waiting = asyncio.create_task(feed.wait(5))
    await asyncio.sleep(0)
    assert not waiting.done()
    feed.close()
    await waiting
