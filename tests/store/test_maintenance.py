"""fsck finds what is wrong and nothing else; gc, backup and restore keep what rows name; all beside a running store."""

import asyncio
import contextlib
import hashlib
from collections.abc import Iterator

import pytest
import xxhash
from click.testing import CliRunner
from sqlalchemy import text

from tests.store.conftest import TOKEN, Caller, FakeClock, s3_settings, serve
from treadle.cli.store import store as store_command
from treadle.errors import TreadleError
from treadle.internal.v1 import journal_pb2
from treadle.v1 import adapters_pb2, admin_pb2, training_pb2
from treadle_store.backends import open_blobs, open_database
from treadle_store.blobs import BlobStore, LocalBlobs
from treadle_store.clock import system_clock
from treadle_store.copying import EPOCH_JUMP, CopyError, back_up, restore
from treadle_store.engines import Engines, open_engines
from treadle_store.fsck import check_store
from treadle_store.s3_blobs import S3Blobs
from treadle_store.settings import StoreSettings
from treadle_store.sweep import Sweeper

WEIGHTS = b"weights" * 1000


def operation(seq: int) -> journal_pb2.JournalAppend:
    body = training_pb2.OptimStep()
    body.adam.learning_rate = seq / 1024
    digest = xxhash.xxh3_64_intdigest(body.SerializeToString(deterministic=True))
    message = training_pb2.Operation(seq=seq, digest=digest, optim_step=body)
    return journal_pb2.JournalAppend(seq=seq, digest=digest, payload=message.SerializeToString())


def result(seq: int) -> journal_pb2.JournalCommit:
    message = training_pb2.OperationResult(seq=seq)
    return journal_pb2.JournalCommit(seq=seq, result=message.SerializeToString(), state_digest=bytes(16))


async def write(store: Caller, run: str, epoch: int, seqs, done=(), acked: int = 0) -> None:
    entry = journal_pb2.JournalEntry(run=run, epoch=epoch, acked_seq=acked)
    entry.appends.extend(operation(seq) for seq in seqs)
    entry.commits.extend(result(seq) for seq in done)
    assert await store.write(entry) == [""]


async def snapshot(store: Caller, run: str, epoch: int, seq: int, content: bytes) -> None:
    saved = journal_pb2.Snapshot(seq=seq, step=seq, sha256=await store.put_blob(content), size=len(content))
    saved.state_digest = bytes(16)
    await store.journal.WriteSnapshot(journal_pb2.WriteSnapshotRequest(run=run, epoch=epoch, snapshot=saved))


async def fill(store: Caller) -> tuple[str, int]:
    """Makes a run with 8 operations (6 done, 3 covered, 2 acked), a long payload, an adapter, and a run from it."""
    run = await store.new_run()
    epoch = await store.claim(run)
    await write(store, run, epoch, range(1, 8), range(1, 7))
    long = operation(8)
    entry = journal_pb2.JournalEntry(run=run, epoch=epoch)
    address = await store.put_blob(long.payload)
    entry.appends.append(journal_pb2.JournalAppend(seq=8, digest=long.digest, payload_sha256=address))
    assert await store.write(entry) == [""]
    await snapshot(store, run, epoch, 3, b"snapshot" * 999)
    await write(store, run, epoch, (), acked=2)
    file = adapters_pb2.AdapterFile(path="adapter_model.safetensors", size=len(WEIGHTS))
    file.sha256 = await store.put_blob(WEIGHTS)
    adapter = adapters_pb2.Adapter(name=f"{run}/revisions/v1", base="treadle/pip", files=[file])
    await store.journal.RecordAdapter(journal_pb2.RecordAdapterRequest(run=run, epoch=epoch, adapter=adapter, seq=6))
    await store.new_run(from_adapter=adapter.name, base="", lora=None)
    await store.put_blob(b"named by no row")
    return run, epoch


@contextlib.contextmanager
def opened(settings: StoreSettings) -> Iterator[tuple[Engines, BlobStore]]:
    engines = open_engines(settings.database)
    try:
        yield engines, open_blobs(settings, beside_a_store=True)
    finally:
        engines.dispose()


def problems(settings: StoreSettings) -> list[str]:
    with opened(settings) as (engines, blobs):
        return check_store(engines, blobs).problems


async def test_a_good_store_has_no_problems(settings, clock) -> None:
    """While it runs; everything is counted."""
    async with serve(settings, clock) as store:
        await fill(store)
        with opened(settings) as (engines, blobs):
            report = await asyncio.to_thread(check_store, engines, blobs)
    assert report.problems == []
    assert report.counts == {
        "runs": 2,
        "operations": 6,
        "adapters": 1,
        "completions": 0,
        "blobs": 3,
        "blobs without a row": 1,
    }


DAMAGE = [
    ("UPDATE runs SET last_done_seq = 99 WHERE last_seq = 8", "are out of order"),
    ("UPDATE runs SET last_done_seq = 4 WHERE last_seq = 8", "operation 5 of {run}: has a result but does not count"),
    ("UPDATE runs SET last_seq = 9 WHERE last_seq = 8", "{run}: lacks the operations 9 to 9"),
    ("UPDATE runs SET acked_seq = 1 WHERE last_seq = 8", "{run}: has operation 3 where 2 should follow"),
    ("DELETE FROM results WHERE seq = 5", "operation 5 of {run}: counts as done but has no result"),
    ("DELETE FROM ops WHERE seq = 5", "{run}: has operation 6 where 5 should follow"),
    ("UPDATE ops SET payload = NULL WHERE seq = 7", "operation 7 of {run}: must have its payload"),
    (
        "UPDATE ops SET payload = (SELECT payload FROM ops WHERE seq = 6) WHERE seq = 3",
        "operation 3 of {run}: still has a payload",
    ),
    ("UPDATE ops SET digest = digest + 1 WHERE seq = 7", "operation 7 of {run}: has a payload that is not that of"),
    (
        "UPDATE ops SET payload = (SELECT payload FROM ops WHERE seq = 6) WHERE seq = 7",
        "operation 7 of {run}: has the payload of operation 6",
    ),
    (
        "UPDATE results SET result = (SELECT result FROM results WHERE seq = 6) WHERE seq = 5",
        "operation 5 of {run}: has the result of operation 6",
    ),
    ("UPDATE results SET state_digest = result WHERE seq = 5", "operation 5 of {run}: has a state digest of 2 bytes"),
    ("UPDATE leases SET epoch = 0", "{run}: has the epoch 0"),
    ("DELETE FROM leases", "{run}: has operations but never had a lease"),
    ("UPDATE snapshots SET seq = 7", "{run}: has a snapshot of 7, but results end at 6"),
    ("UPDATE snapshots SET size = 1", "snapshot of {run}: blob"),
    ("DELETE FROM adapter_files", "{run}/revisions/v1: has no files"),
    ("DELETE FROM adapters", "starts from {run}/revisions/v1, which is not there"),
    (
        "UPDATE adapter_files SET sha256 = '" + "0" * 64 + "'",
        "adapter_model.safetensors of {run}/revisions/v1: blob 000",
    ),
    ("UPDATE alembic_version SET version_num = '0001'", "schema: is at version 0001"),
]


async def test_every_damage_is_named(settings, clock) -> None:
    """Each statement breaks one invariant; fsck names the row and what is wrong with it, and restoring it heals."""
    async with serve(settings, clock) as store:
        run, _ = await fill(store)
    backup = settings.data_dir.parent / "backup"
    with opened(settings) as (engines, blobs):
        back_up(engines, blobs, backup)
    sqlite = open_engines(f"sqlite:///{backup / 'store.db'}")
    copied = LocalBlobs(backup / "blobs")
    with opened(settings) as (engines, blobs):
        for target, kept in ((engines, blobs), (sqlite, copied)):
            for statement, words in DAMAGE:
                with target.writer.connect() as connection:
                    transaction = connection.begin()
                    connection.execute(text(statement))
                    # fsck looks from outside: what it checks must be committed, and is taken back afterwards.
                    found = _check_inside(target, connection, kept)
                    transaction.rollback()
                assert any(words.format(run=run) in problem for problem in found), (statement, found)
            assert check_store(target, kept).problems == []
    sqlite.dispose()


def _check_inside(engines: Engines, connection, blobs: BlobStore) -> list[str]:
    """Runs fsck on the uncommitted state of a connection."""

    class Inside:
        dialect = engines.reader.dialect

        @contextlib.contextmanager
        def begin(self):
            yield connection

        connect = begin

    return check_store(Engines(engines.kind, engines.writer, Inside()), blobs).problems


async def test_damaged_blobs_are_named(settings, clock) -> None:
    """A blob with other content, and a missing one; --quick sees only the missing one."""
    async with serve(settings, clock) as store:
        run, _ = await fill(store)
    address = hashlib.sha256(WEIGHTS).hexdigest()
    with opened(settings) as (engines, blobs):
        if isinstance(blobs, LocalBlobs):
            blobs.path_of(address).write_bytes(WEIGHTS[::-1])
        else:
            assert isinstance(blobs, S3Blobs)
            blobs.sweep(address, 0)
            blobs.upload(address, WEIGHTS[::-1])
        (problem,) = check_store(engines, blobs).problems
        assert problem.startswith(f"adapter_model.safetensors of {run}/revisions/v1: blob {address} has other content")
        assert check_store(engines, blobs, read_contents=False).problems == []
        blobs.sweep(address, 0)
        assert "is not there" in check_store(engines, blobs, read_contents=False).problems[0]
        with pytest.raises(CopyError, match=address):
            back_up(engines, blobs, settings.data_dir.parent / "backup")
    assert not (settings.data_dir.parent / "backup").exists()


async def keep_writing(store: Caller, run: str, epoch: int, seq: int, stop: asyncio.Event) -> int:
    """Appends, commits, snapshots and acks until told to stop; returns the last seq."""
    while not stop.is_set():
        seq += 1
        await write(store, run, epoch, [seq], [seq])
        if seq % 5 == 0:
            await snapshot(store, run, epoch, seq, b"snapshot %d " % seq * 500)
            await write(store, run, epoch, (), acked=seq - 2)
    return seq


@pytest.mark.parametrize("target", ["sqlite and a folder", "postgresql and s3"])
async def test_a_backup_of_a_busy_store_is_one_moment_of_it(settings, clock, target, tmp_path, request) -> None:
    """Writes and impatient sweeps go on; what was acknowledged before is in it; it goes into either kind of store."""
    async with serve(settings, clock) as store:
        run = await store.new_run()
        epoch = await store.claim(run)
        await store.tenant("root", "admin").admin.CreateTenant(admin_pb2.CreateTenantRequest(tenant="t"))
        before = 12
        for seq in range(1, before + 1):
            await write(store, run, epoch, [seq], [seq])
        stop = asyncio.Event()
        writing = asyncio.create_task(keep_writing(store, run, epoch, before, stop))
        database, blobs = open_database(settings), open_blobs(settings, beside_a_store=True)
        sweeper = Sweeper(database, blobs, system_clock, grace_seconds=1.0)
        sweeping = asyncio.create_task(sweeper.run(0.01, 60))
        with opened(settings) as (engines, _):
            await asyncio.to_thread(back_up, engines, blobs, tmp_path / "backup")
        stop.set()
        last = await writing
        sweeping.cancel()
        await asyncio.wait([sweeping])
        database.close()
    elsewhere: dict[str, object] = {}
    if target != "sqlite and a folder":
        elsewhere = {
            "database_url": request.getfixturevalue("postgres").new_database(),
            **s3_settings(request.getfixturevalue("s3")),
        }
    place = StoreSettings(
        listen="127.0.0.1:0", data_dir=tmp_path / "restored", internal_token=settings.internal_token, **elsewhere
    )
    with opened(place) as (engines, blobs):
        restore(tmp_path / "backup", engines, blobs)
    assert problems(place) == []
    async with serve(place, clock) as store:
        stale = journal_pb2.JournalEntry(run=run, epoch=epoch, appends=[operation(last + 1)])
        assert await store.write(stale) == ["STALE_LEASE"]
        assert await store.claim(run) == epoch + EPOCH_JUMP + 1
        header, operations = await store.recover(run, epoch + EPOCH_JUMP + 1)
        assert before <= header.last_seq <= last
        assert operations[-1].seq == header.last_seq or header.acked_seq == header.last_seq
    assert problems(place) == []


async def test_nothing_is_swept_while_a_backup_is_taken(settings, clock, tmp_path) -> None:
    """A snapshot that is replaced during the copy stays until the copy is done."""
    async with serve(settings, clock) as store:
        run = await store.new_run()
        epoch = await store.claim(run)
        await write(store, run, epoch, [1, 2], [1, 2])
        await snapshot(store, run, epoch, 1, b"first")
        await asyncio.sleep(1.2)
        database, blobs = open_database(settings), open_blobs(settings, beside_a_store=True)
        sweeper = Sweeper(database, blobs, system_clock, grace_seconds=0.0)
        swept: list[int] = []
        loop = asyncio.get_running_loop()

        class Meanwhile:
            """The blobs; before the first one is read its row goes away and a sweep is tried."""

            def __getattr__(self, name: str):
                return getattr(blobs, name)

            def read(self, sha256: str, offset: int, length: int) -> bytes:
                if not swept:
                    asyncio.run_coroutine_threadsafe(snapshot(store, run, epoch, 2, b"second"), loop).result()
                    swept.append(asyncio.run_coroutine_threadsafe(sweeper.sweep(60), loop).result())
                return blobs.read(sha256, offset, length)

        with opened(settings) as (engines, _):
            await asyncio.to_thread(back_up, engines, Meanwhile(), tmp_path / "backup")
        assert swept == [0]
        assert await sweeper.sweep(60) == 1
        database.close()
    kept = LocalBlobs(tmp_path / "backup" / "blobs")
    assert list(kept.addresses()) == [hashlib.sha256(b"first").hexdigest()]


async def test_a_restore_needs_an_empty_place(settings, clock, tmp_path) -> None:
    """It refuses to mix two stores, and says what is there; a backup refuses to overwrite one."""
    async with serve(settings, clock) as store:
        await fill(store)
    with opened(settings) as (engines, blobs):
        back_up(engines, blobs, tmp_path / "backup")
        with pytest.raises(CopyError, match="already"):
            restore(tmp_path / "backup", engines, blobs)
        with pytest.raises(CopyError, match="exists"):
            back_up(engines, blobs, tmp_path / "backup")
        with pytest.raises(CopyError, match="not a backup"):
            restore(tmp_path, engines, blobs)
    assert sorted(path.name for path in (tmp_path / "backup").iterdir()) == ["blobs", "store.db"]


async def test_a_blob_that_was_damaged_stops_the_backup(tmp_path, clock) -> None:
    """It is hashed on its way; no backup with a damaged blob appears."""
    settings = StoreSettings(listen="127.0.0.1:0", data_dir=tmp_path / "data", internal_token=TOKEN)
    async with serve(settings, clock) as store:
        await fill(store)
    with opened(settings) as (engines, blobs):
        blobs.path_of(hashlib.sha256(WEIGHTS).hexdigest()).write_bytes(WEIGHTS[::-1])
        with pytest.raises(TreadleError) as raised:
            back_up(engines, blobs, tmp_path / "backup")
    assert raised.value.reason == "CHECKSUM_MISMATCH"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


async def test_the_commands_do_it(tmp_path, clock: FakeClock) -> None:
    """fsck, gc, backup and restore on the command line, with their exit codes."""
    settings = StoreSettings(listen="127.0.0.1:0", data_dir=tmp_path / "data", internal_token=TOKEN)
    async with serve(settings, clock) as store:
        await fill(store)
        where = ["--data-dir", str(tmp_path / "data")]

        async def call(*arguments: str) -> tuple[int, str]:
            done = await asyncio.to_thread(CliRunner().invoke, store_command, arguments)
            return done.exit_code, done.output

        assert await call("fsck", *where) == (
            0,
            "0 problems in 2 runs, 6 operations, 1 adapters, 0 completions, 3 blobs, 1 blobs without a row\n",
        )
        assert await call("gc", *where, "--dry-run") == (0, "1 blobs are named by no row\n")
        assert (await call("gc", *where))[1].endswith("0 blobs removed\n")
        assert (await call("backup", str(tmp_path / "copy"), *where))[0] == 0
        busy = await call("restore", str(tmp_path / "copy"), *where)
        assert busy[0] == 1
        assert "another store uses" in busy[1]
        restored = ["--data-dir", str(tmp_path / "restored")]
        assert (await call("restore", str(tmp_path / "copy"), *restored))[0] == 0
        assert (await call("fsck", *restored, "--json"))[0] == 0
        (tmp_path / "restored" / "blobs" / hashlib.sha256(WEIGHTS).hexdigest()[:2]).rename(tmp_path / "gone")
        (tmp_path / "restored" / "blobs" / hashlib.sha256(WEIGHTS).hexdigest()[:2]).mkdir()
        code, output = await call("fsck", *restored)
        assert code == 1
        assert "PROBLEM adapter_model.safetensors" in output
        code, output = await call("fsck", "--data-dir", str(tmp_path / "nowhere"))
        assert code == 1
        assert "there is no store at" in output
