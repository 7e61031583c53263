"""Opens what the settings name: the database, the blobs, and the locks that keep a second store away from files.

Whatever cannot be opened ends the process with a sentence for its operator. Knows no table and no RPC.
"""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from treadle.errors import TreadleError
from treadle_store.blobs import BlobStore, LocalBlobs
from treadle_store.database import Database
from treadle_store.engines import SchemaError, sqlite_file
from treadle_store.s3_blobs import S3Blobs, S3Place
from treadle_store.settings import StoreSettings


def open_database(settings: StoreSettings) -> Database:
    """Returns the database, migrated. Raises SystemExit when it cannot be used."""
    try:
        return Database(settings.database)
    except (SchemaError, TreadleError) as error:
        raise SystemExit(f"the store cannot open its database: {error}") from error


def open_blobs(settings: StoreSettings, *, beside_a_store: bool = False) -> BlobStore:
    """Returns the blobs' place, for the store or for a tool beside it. Raises SystemExit when it cannot be used."""
    try:
        if not settings.blobs_url:
            return LocalBlobs(settings.data_dir / "blobs", beside_a_store=beside_a_store)
        place = S3Place(
            settings.blobs_url,
            settings.s3_endpoint,
            settings.s3_region,
            settings.s3_access_key_id,
            settings.s3_secret_access_key.get_secret_value(),
        )
        # Half of the shortest grace is for the difference of clocks and the time between keeping a blob and naming it.
        grace_seconds = min(settings.sweep_grace_seconds, settings.unnamed_idle_seconds)
        return S3Blobs(place, settings.data_dir / "incoming", grace_seconds / 2)
    except (TreadleError, OSError) as error:
        raise SystemExit(f"the store cannot open its blobs: {error}") from error


@contextlib.contextmanager
def lock_folders(settings: StoreSettings) -> Iterator[None]:
    """Holds the locks of all folders that the store writes to. Raises SystemExit when another store has one."""
    folders = {settings.data_dir.absolute()}
    database_file = sqlite_file(settings.database)
    if database_file is not None:
        folders.add(database_file.parent)
    with contextlib.ExitStack() as stack:
        for folder in sorted(folders):
            stack.enter_context(_sole_user(folder))
        yield


@contextlib.contextmanager
def _sole_user(folder: Path) -> Iterator[None]:
    """Holds the folder's lock; the system frees it when the process ends, however it ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "store.lock").open("w")
    except OSError as error:
        raise SystemExit(f"the store cannot use {folder}: {error.strerror}") from error
    with file as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"another store uses {folder}; stop it or set another data_dir") from None
        yield
