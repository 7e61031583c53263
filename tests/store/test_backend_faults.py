"""PostgreSQL and S3 go away, answer errors or fall silent: deadlines hold, what was acknowledged stays, it passes."""

import asyncio
import itertools
import random
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest

from tests.store.conftest import TOKEN, Caller, FakeClock, reason_of, s3_settings, serve
from tests.store.test_maintenance import operation, result
from tests.support.postgres import PostgresServer
from tests.support.proxy import TroubleProxy
from tests.support.s3 import S3Server
from treadle.internal.v1 import blobs_pb2, journal_pb2
from treadle_store import engines, s3_blobs
from treadle_store.settings import StoreSettings

SLOW_DOWN = b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
REFUSED = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


@pytest.fixture
def own_postgres() -> Iterator[PostgresServer]:
    """A server that this test may stop."""
    server = PostgresServer()
    try:
        server.create()
        yield server
    finally:
        server.close()


@asynccontextmanager
async def store_on(folder: Path, **elsewhere: object) -> AsyncIterator[Caller]:
    settings = StoreSettings(listen="127.0.0.1:0", data_dir=folder, internal_token=TOKEN, **elsewhere)
    async with serve(settings, FakeClock()) as store:
        yield store


async def write_through(store: Caller, run: str, epoch: int, stop: asyncio.Event, refused: list[str]) -> int:
    """Appends one operation after the other, each again until it is acknowledged; returns the last one."""
    for seq in itertools.count(1):
        entry = journal_pb2.JournalEntry(run=run, epoch=epoch, appends=[operation(seq)], commits=[result(seq)])
        while reason := await reason_of(
            store.journal.WriteJournal(journal_pb2.WriteJournalRequest(entries=[entry]), timeout=10)
        ):
            refused.append(reason)
            await asyncio.sleep(0.02)
        if stop.is_set():
            return seq
    raise AssertionError


async def write_under(trouble, store: Caller) -> list[str]:
    """Runs writers of four runs while `trouble` goes on; returns the reasons of refusals after comparing what is there.

    Every acknowledged operation is there once, with its result, and nothing that was not sent.
    """
    runs = [await store.new_run() for _ in range(4)]
    epochs = [await store.claim(run) for run in runs]
    stop, refused = asyncio.Event(), list[str]()
    writing = [
        asyncio.create_task(write_through(store, run, epoch, stop, refused))
        for run, epoch in zip(runs, epochs, strict=True)
    ]
    await trouble()
    stop.set()
    lasts = await asyncio.gather(*writing)
    for run, epoch, last in zip(runs, epochs, lasts, strict=True):
        header, operations = await store.recover(run, epoch)
        assert header.last_seq == last
        assert [op.seq for op in operations] == list(range(1, last + 1))
        assert all(op.result == result(op.seq).result for op in operations)
    return refused


async def test_postgresql_restarts_in_mid_commit(own_postgres, tmp_path) -> None:
    """Orderly and as in a crash, under load: refusals are retryable, nothing acknowledged is lost or doubled."""

    async def trouble() -> None:
        for how in (signal.SIGINT, signal.SIGQUIT, signal.SIGQUIT):
            await asyncio.sleep(0.4)
            await asyncio.to_thread(own_postgres.stop, how)
            await asyncio.sleep(0.3)
            await asyncio.to_thread(own_postgres.start)
        await asyncio.sleep(0.3)

    async with store_on(tmp_path / "data", database_url=own_postgres.new_database()) as store:
        refused = await write_under(trouble, store)
    assert set(refused) == {"UNAVAILABLE"}


async def test_connections_to_postgresql_are_cut_at_any_moment(postgres: PostgresServer, tmp_path) -> None:
    """Also between a commit and its acknowledgement, when nobody knows whether it took place."""
    chance = random.Random(0)
    with TroubleProxy(f"127.0.0.1:{postgres.port}", delay_seconds=0.002) as proxy:

        async def trouble() -> None:
            for _ in range(40):
                await asyncio.sleep(chance.uniform(0.02, 0.06))
                await asyncio.to_thread(proxy.cut)

        url = through(proxy, postgres)
        async with store_on(tmp_path / "data", database_url=url) as store:
            refused = await write_under(trouble, store)
    assert set(refused) <= {"UNAVAILABLE"}
    assert proxy.num_cuts >= 20


async def test_an_idle_connection_that_was_cut_is_not_noticed(postgres: PostgresServer, tmp_path) -> None:
    """What certainly had no effect runs again on a new connection, reads and writes."""
    with TroubleProxy(f"127.0.0.1:{postgres.port}") as proxy:
        async with store_on(tmp_path / "data", database_url=through(proxy, postgres)) as store:
            run = await store.new_run()
            for _ in range(5):
                proxy.cut()
                await store.claim(run)
                proxy.cut()
                await store.journal.LookupRun(journal_pb2.LookupRunRequest(run=run))


async def test_a_silent_postgresql_holds_nobody_longer_than_the_deadline(
    postgres: PostgresServer, tmp_path, monkeypatch
) -> None:
    """The caller's deadline ends the call; the store gives the connection up and works again when the way is clear."""
    monkeypatch.setattr(engines, "_PATIENCE_SECONDS", 2.0)
    with TroubleProxy(f"127.0.0.1:{postgres.port}") as proxy:
        async with store_on(tmp_path / "data", database_url=through(proxy, postgres)) as store:
            run = await store.new_run()
            proxy.delay_seconds = 3600.0
            began = time.monotonic()
            claim = journal_pb2.ClaimRunRequest(run=run, holder="w")
            assert await reason_of(store.journal.ClaimRun(claim, timeout=1)) == "DEADLINE_EXCEEDED"
            lookup = journal_pb2.LookupRunRequest(run=run)
            assert await reason_of(store.journal.LookupRun(lookup, timeout=1)) == "DEADLINE_EXCEEDED"
            assert time.monotonic() - began < 8
            proxy.delay_seconds = 0.0
            answer = await store.journal.ClaimRun(claim, timeout=20)
            # The first claim, whose caller is gone, may have been carried out by now.
            assert answer.lease.epoch in (1, 2)


async def test_a_store_without_its_database_does_not_start(own_postgres, tmp_path) -> None:
    """It says why."""
    url = own_postgres.new_database()
    own_postgres.stop()
    with pytest.raises(SystemExit, match="cannot open its database"):
        async with store_on(tmp_path / "data", database_url=url):
            pass


@pytest.fixture
def quick_s3(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same limits, shorter."""
    monkeypatch.setattr(s3_blobs, "REQUEST_SECONDS", 1)
    monkeypatch.setattr(s3_blobs, "CONNECT_SECONDS", 1)
    monkeypatch.setattr(s3_blobs, "RETRY_SECONDS", 1)


async def test_a_bucket_in_trouble_gives_clear_answers_and_passes(s3: S3Server, tmp_path, quick_s3) -> None:
    """503, 403, silence, refused and cut connections: every call on blobs is UNAVAILABLE in time, then all is well."""
    with TroubleProxy(s3.address) as proxy:
        place = s3_settings(s3, f"http://{proxy.address}")
        async with store_on(tmp_path / "data", **place) as store:
            kept = await store.put_blob(b"kept" * 1000)
            for trouble in ({"answer": SLOW_DOWN}, {"answer": REFUSED}, {"delay_seconds": 3600.0}, {"refusing": True}):
                for name, value in trouble.items():
                    setattr(proxy, name, value)
                proxy.cut()
                began = time.monotonic()
                for call in calls(store, kept):
                    assert (trouble, await reason_of(call)) == (trouble, "UNAVAILABLE")
                assert time.monotonic() - began < 40
                proxy.answer, proxy.delay_seconds, proxy.refusing = b"", 0.0, False
                proxy.cut()
                assert await store.put_blob(b"kept" * 1000) == kept
                for call in calls(store, kept):
                    assert await reason_of(call) == ""


def calls(store: Caller, kept: str):
    """Every kind of call that needs the bucket."""

    async def put() -> None:
        await store.put_blob(b"new %f" % time.monotonic() * 1000)

    yield put()
    yield store.blobs.StatBlob(blobs_pb2.StatBlobRequest(sha256=kept))
    yield store.blobs.GetBlob(blobs_pb2.GetBlobRequest(sha256=kept))


async def test_a_journal_entry_waits_for_its_blob_in_a_bucket_in_trouble(s3: S3Server, tmp_path, quick_s3) -> None:
    """An entry whose payload cannot be looked for is refused as retryable, not as missing."""
    with TroubleProxy(s3.address) as proxy:
        async with store_on(tmp_path / "data", **s3_settings(s3, f"http://{proxy.address}")) as store:
            run = await store.new_run()
            append = journal_pb2.JournalAppend(seq=1, digest=1, payload_sha256=await store.put_blob(b"payload"))
            entry = journal_pb2.JournalEntry(run=run, epoch=await store.claim(run), appends=[append])
            proxy.answer = SLOW_DOWN
            proxy.cut()
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await store.write(entry)
            assert raised.value.code() == grpc.StatusCode.UNAVAILABLE
            proxy.answer = b""
            assert await store.write(entry) == [""]


def through(proxy: TroubleProxy, server: PostgresServer) -> str:
    """Returns the URL of a new database by way of the proxy."""
    name = server.new_database().partition("?")[0].rpartition("/")[2]
    return f"postgresql://treadle@{proxy.address}/{name}"
