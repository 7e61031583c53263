"""Copies a whole store: to a folder while it runs (backup), from a folder into an empty place (restore).

A backup is itself a store: a SQLite file `store.db` and a folder `blobs`, whatever it was taken from. So it can be
checked, looked at and served like any other, and a restore may lead from one kind of database to another.

A backup is consistent because rows come from one view, and because a hold that began before that view keeps sweeps
away from the blobs that it names. A restore fences every worker off that may still live: epochs jump, so that whatever
lease was given out after the backup is stale.
"""

import contextlib
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from sqlalchemy import Connection, Engine, delete, exists, insert, select, update

from treadle_store.blobs import BlobStore, LocalBlobs, sync_folder
from treadle_store.clock import system_clock
from treadle_store.engines import Engines, migrate, open_engines, schema_versions
from treadle_store.fsck import blob_uses
from treadle_store.tables import holds, leases, metadata

HOLD_SECONDS: Final = 600.0
EPOCH_JUMP: Final = 1_000_000
COPY_BYTES: Final = 4 * 2**20
FETCH_ROWS: Final = 32
# What lasts as long as a process or a backup does.
_PASSING: Final = frozenset({"holds", "heard_workers"})
_TABLES: Final = [table for table in metadata.sorted_tables if table.name not in _PASSING]


class CopyError(Exception):
    """The copy cannot be made; says what to do."""


def back_up(engines: Engines, blobs: BlobStore, target: Path) -> int:
    """Copies a store, which may be running, to a new folder; returns the number of blobs.

    The folder appears when all of it is durable. Raises CopyError, or TreadleError when a blob cannot be read.
    """
    if target.exists():
        raise CopyError(f"{target} exists; a backup goes to a new folder")
    found, known = schema_versions(engines.reader)
    if found != known:
        raise CopyError(f"the store's schema is at {found or 'none'}, this release uses {known}; start the store once")
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    partial.mkdir(parents=True)
    try:
        with _hold(engines.writer):
            copied = _opened_copy(partial / "store.db")
            try:
                with engines.reader.begin() as source, copied.writer.begin() as sink:
                    _copy_rows(source, sink)
                with copied.reader.begin() as connection:
                    addresses = sorted({use.sha256 for use in blob_uses(connection)})
            finally:
                _close_file(copied)
            kept = LocalBlobs(partial / "blobs")
            for address in addresses:
                _copy_blob(blobs, kept, address)
        (partial / "blobs" / "lock").unlink()
        for folder in (partial / "blobs", partial):
            sync_folder(folder)
        partial.rename(target)
        sync_folder(target.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return len(addresses)


def restore(source: Path, engines: Engines, blobs: BlobStore) -> int:
    """Copies a backup into an empty store that is not running; returns the number of blobs.

    Blobs come first and all rows in one transaction: what is cut short can be repeated. Raises CopyError.
    """
    if not (source / "store.db").is_file():
        raise CopyError(f"{source} is not a backup: it has no store.db")
    migrate(engines.writer)
    with _scratch_copy(source / "store.db", source.parent) as backup:
        with backup.reader.begin() as connection:
            addresses = sorted({use.sha256 for use in blob_uses(connection)})
        kept = LocalBlobs(source / "blobs", beside_a_store=True)
        _require_empty(engines.reader)
        for address in addresses:
            _copy_blob(kept, blobs, address)
        with backup.reader.begin() as rows, engines.writer.begin() as sink:
            _copy_rows(rows, sink)
            fence = {"epoch": leases.c.epoch + EPOCH_JUMP, "holder": "", "address": "", "expires_us": 0}
            sink.execute(update(leases).values(**fence))
    return len(addresses)


def _copy_rows(source: Connection, sink: Connection) -> None:
    for table in _TABLES:
        rows = source.execute(select(*table.c).execution_options(yield_per=FETCH_ROWS))
        for page in rows.partitions():
            sink.execute(insert(table), [row._asdict() for row in page])


def _copy_blob(source: BlobStore, sink: BlobStore, sha256: str) -> None:
    size = source.size_of(sha256)
    if size is None:
        raise CopyError(f"blob {sha256} is missing; `treadle store fsck` tells what names it")
    if sink.keep(sha256) == size:
        return
    with sink.open_writer(sha256, size) as writer:
        offset = 0
        while data := source.read(sha256, offset, COPY_BYTES):
            writer.write(data)
            offset += len(data)
        writer.finish()


def _require_empty(engine: Engine) -> None:
    with engine.begin() as connection:
        for table in _TABLES:
            if connection.execute(select(exists(select(*table.primary_key.columns)))).scalar_one():
                raise CopyError(f"the database holds {table.name} already; a restore goes into an empty one")


def _opened_copy(file: Path) -> Engines:
    engines = open_engines(f"sqlite:///{file.absolute()}")
    migrate(engines.writer)
    return engines


def _close_file(engines: Engines) -> None:
    """Leaves all in the one file, durable, without a log beside it."""
    engines.reader.dispose()
    with engines.writer.connect() as connection:
        raw = connection.connection.driver_connection
        assert raw is not None
        raw.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        raw.execute("PRAGMA journal_mode=DELETE")
    engines.dispose()


@contextlib.contextmanager
def _scratch_copy(file: Path, folder: Path) -> Iterator[Engines]:
    """Opens a copy at the newest schema, so that a backup of an older release stays as it is."""
    scratch = folder / f".restore.{secrets.token_hex(4)}.db"
    engines = None
    try:
        shutil.copyfile(file, scratch)
        engines = _opened_copy(scratch)
        yield engines
    finally:
        if engines is not None:
            engines.dispose()
        for leftover in folder.glob(f"{scratch.name}*"):
            leftover.unlink()


@contextlib.contextmanager
def _hold(engine: Engine) -> Iterator[None]:
    """Keeps all sweeps away until left; ends by itself when this process dies."""
    name, left = f"backup-{os.getpid()}-{secrets.token_hex(4)}", threading.Event()

    def renew() -> None:
        with engine.begin() as connection:
            connection.execute(delete(holds).where(holds.c.hold == name))
            ends_us = system_clock() + int(HOLD_SECONDS * 1e6)
            connection.execute(insert(holds).values(hold=name, expires_us=ends_us))

    failures: list[Exception] = []
    renew()
    renewing = threading.Thread(target=_repeat, args=(renew, left, failures), daemon=True)
    renewing.start()
    try:
        yield
        if failures:
            raise CopyError(f"the store did not let the backup hold sweeps off to its end: {failures[0]}")
    finally:
        left.set()
        renewing.join()
        with engine.begin() as connection:
            connection.execute(delete(holds).where(holds.c.hold == name))


def _repeat(renew: Callable[[], None], left: threading.Event, failures: list[Exception]) -> None:
    """Renews well before the end; gives up only when the hold has ended."""
    renewed = time.monotonic()
    while not left.wait(HOLD_SECONDS / 10):
        try:
            renew()
            renewed = time.monotonic()
        except Exception as error:  # noqa: BLE001  The thread's guard: the copy decides what it means.
            if time.monotonic() - renewed > HOLD_SECONDS * 0.8:
                failures.append(error)
                return
