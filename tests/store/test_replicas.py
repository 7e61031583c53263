"""Two stores on one PostgreSQL database: what one of them allows, the other may not undermine."""

import asyncio
import threading
from collections.abc import Iterator

import pytest
from sqlalchemy import Connection

from tests.store.conftest import TOKEN, Caller, entry, s3_settings, serve
from tests.support.postgres import PostgresServer
from treadle.errors import TreadleError
from treadle.internal.v1 import journal_pb2, workers_pb2
from treadle.names import RunName, parse_run
from treadle.v1 import admin_pb2, training_pb2
from treadle_store import catalog, identity, journal
from treadle_store.clock import system_clock
from treadle_store.database import Batched, Database
from treadle_store.journal_entries import RunEntry, write_entries
from treadle_store.settings import StoreSettings

TTL_US = 10_000_000


@pytest.fixture
def replicas(postgres: PostgresServer) -> Iterator[tuple[Database, Database]]:
    url = postgres.new_database()
    pair = Database(url), Database(url)
    yield pair
    for database in pair:
        database.close()


async def new_run(database: Database, request_id: str = "") -> RunName:
    request = training_pb2.CreateRunRequest(base="b", request_id=request_id)
    run, _ = await database.write(lambda connection: catalog.register_run(connection, "acme", request, 0))
    return parse_run(run.name)


def claim(run: RunName, holder: str, now_us: int):
    return lambda connection: journal.claim_run(connection, journal.Claim(run, holder, "h:1", TTL_US), now_us)


class Paused:
    """A body that stops at its end until told to go on, its transaction open."""

    def __init__(self, body) -> None:
        self.body = body
        self.reached, self.go_on = threading.Event(), threading.Event()

    def __call__(self, connection: Connection):
        value = self.body(connection)
        self.reached.set()
        assert self.go_on.wait(20)
        return value


async def test_a_write_that_waits_for_a_claim_is_stale(replicas) -> None:
    """The old holder's write that began before the claim was committed does not get in after it."""
    one, other = replicas
    run = await new_run(one)
    epoch = (await one.write(claim(run, "old", 0))).lease.epoch
    claiming = Paused(claim(run, "new", 2 * TTL_US))
    granted = asyncio.create_task(one.write(claiming))
    await asyncio.to_thread(claiming.reached.wait, 20)
    late = journal_pb2.JournalEntry.FromString(entry(str(run), epoch, [1], [1]).SerializeToString())
    writing = asyncio.create_task(other.write(Batched(write_entries, RunEntry(run, late, 0))))
    await asyncio.sleep(0.3)
    assert not writing.done()
    claiming.go_on.set()
    new_epoch = (await granted).lease.epoch
    with pytest.raises(TreadleError) as raised:
        await writing
    assert raised.value.reason == "STALE_LEASE"
    header = await other.read(lambda connection: journal.recovery_header(connection, run, new_epoch))
    assert header.last_seq == 0


async def test_a_claim_waits_for_a_write_and_sees_it(replicas) -> None:
    """What the old holder wrote under its lease is part of what the new one recovers."""
    one, other = replicas
    run = await new_run(one)
    epoch = (await one.write(claim(run, "old", 0))).lease.epoch
    write = Paused(Batched(write_entries, RunEntry(run, entry(str(run), epoch, [1], [1]), 0)))
    writing = asyncio.create_task(one.write(write))
    await asyncio.to_thread(write.reached.wait, 20)
    claiming = asyncio.create_task(other.write(claim(run, "new", 2 * TTL_US)))
    await asyncio.sleep(0.3)
    assert not claiming.done()
    write.go_on.set()
    await writing
    new_epoch = (await claiming).lease.epoch
    header = await other.read(lambda connection: journal.recovery_header(connection, run, new_epoch))
    assert header.last_seq == 1


async def test_a_claim_sees_a_renewal_that_was_under_way(replicas) -> None:
    """A lease that is being renewed is not taken for expired."""
    one, other = replicas
    run = await new_run(one)
    await one.write(claim(run, "old", 0))
    renewal = Paused(lambda connection: journal.renew_leases(connection, "old", TTL_US, 2 * TTL_US))
    renewing = asyncio.create_task(one.write(renewal))
    await asyncio.to_thread(renewal.reached.wait, 20)
    claiming = asyncio.create_task(other.write(claim(run, "new", 2 * TTL_US)))
    await asyncio.sleep(0.3)
    renewal.go_on.set()
    assert await renewing == {str(run): 1}
    with pytest.raises(TreadleError) as raised:
        await claiming
    assert raised.value.reason == "LEASE_HELD"


async def test_two_claims_at_once_have_one_winner(replicas) -> None:
    """Also the first ones ever, when there is no lease to lock yet."""
    for _ in range(10):
        run = await new_run(replicas[0])
        claims = [replicas[i % 2].write(claim(run, f"w{i}", 0)) for i in range(6)]
        outcomes = await asyncio.gather(*claims, return_exceptions=True)
        assert sorted(getattr(o, "reason", "") for o in outcomes) == [""] + ["LEASE_HELD"] * 5


async def test_the_same_request_makes_one_run(replicas) -> None:
    """Two replicas that get the same request at once answer with the same run; a tenant is made once."""
    for i in range(10):
        runs = await asyncio.gather(*(new_run(database, f"request-{i}") for database in replicas * 3))
        assert len(set(runs)) == 1
        making = [
            database.write(lambda connection, i=i: identity.create_tenant(connection, f"t{i}", 0))
            for database in replicas * 2
        ]
        outcomes = await asyncio.gather(*making, return_exceptions=True)
        assert sorted(getattr(o, "reason", "") for o in outcomes) == ["", *["TENANT_EXISTS"] * 3]


async def test_a_deadlock_between_replicas_is_resolved(replicas) -> None:
    """Whoever the server picks as its victim runs again; both writes take effect."""
    one, other = replicas
    runs = [await new_run(one) for _ in range(2)]
    epochs = [(await one.write(claim(run, "w", 0))).lease.epoch for run in runs]
    meet = threading.Barrier(2)

    def write(order: list[int], seq: int):
        met = False

        def body(connection: Connection) -> None:
            nonlocal met
            for i, index in enumerate(order):
                journal.check_epoch(connection, runs[index], epochs[index])
                if i == 0 and not met:
                    met = True
                    meet.wait(20)
            identity.create_tenant(connection, f"tenant-{seq}", 0)

        return body

    await asyncio.gather(one.write(write([0, 1], 1)), other.write(write([1, 0], 2)))
    assert [t.tenant for t in await one.read(identity.list_tenants)] == ["tenant-1", "tenant-2"]


async def test_each_store_knows_the_workers_of_all(postgres, s3, tmp_path) -> None:
    """Two stores with one database and one bucket: workers, runs and blobs of one are those of the other."""
    url, bucket = postgres.new_database(), s3_settings(s3)
    one, other = (
        StoreSettings(
            listen="127.0.0.1:0",
            data_dir=tmp_path / name,
            internal_token=TOKEN,
            replicas=2,
            database_url=url,
            **bucket,
        )
        for name in ("one", "other")
    )
    async with serve(one, system_clock) as first, serve(other, system_clock) as second:
        for store, name in ((first, "trainer-0"), (second, "sampler-0")):
            kind = admin_pb2.WORKER_KIND_TRAINER if store is first else admin_pb2.WORKER_KIND_SAMPLER
            beat = workers_pb2.HeartbeatRequest(worker=admin_pb2.Worker(worker=name, kind=kind))
            beat.ttl.FromSeconds(60)
            await store.workers.Heartbeat(beat)
        both = ["sampler-0", "trainer-0"]
        await until(lambda: workers_of(first), both)
        await until(lambda: workers_of(second), both)
        await first.workers.Unregister(workers_pb2.UnregisterRequest(worker="trainer-0"))
        await until(lambda: workers_of(second), ["sampler-0"])
        run = await first.new_run()
        epoch = await second.claim(run)
        address = await first.put_blob(b"a long payload")
        append = journal_pb2.JournalAppend(seq=1, digest=1, payload_sha256=address)
        assert await second.write(journal_pb2.JournalEntry(run=run, epoch=epoch, appends=[append])) == [""]
        assert (await first.recover(run, epoch))[1][0].payload_sha256 == address
        assert sorted(path.name for path in tmp_path.glob("*/admin.key")) == ["admin.key"]


async def workers_of(store: Caller) -> list[str]:
    answer = await store.workers.ScanWorkers(workers_pb2.ScanWorkersRequest())
    return [entry.worker.worker for entry in answer.workers]


async def until(look, expected: list[str]) -> None:
    """Looks until the answer is the expected one; the test's own time limit ends it otherwise."""
    while await look() != expected:
        await asyncio.sleep(0.05)
