"""Blobs in an S3 bucket, or in anything that speaks its protocol. Any number of stores may share it.

A blob's objects are `<prefix>/ab/cdef.../<copy>`: every upload is a new object, which S3 shows whole or not at all
and which never changes. A sweep removes objects by age; since a new use of an old blob is a new, young object, no
sweep of any store can remove what another store has just promised. Knows nothing of what the bytes are.
"""

import contextlib
import secrets
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final, cast
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store

from treadle.errors import TreadleError, make_error
from treadle_service.logs import get_logger
from treadle_store.blobs import ADDRESS, BlobWriter, CheckedWriter, blob_not_found, check_address

if TYPE_CHECKING:
    from obstore.store import S3Config

# Shorter uploads are one request; longer ones go in parts of this length and appear when the last one is in.
PART_BYTES: Final = 8 * 2**20
MAX_KNOWN: Final = 4096
# A request that fails is tried again by the library until this much time has passed since its start.
REQUEST_SECONDS: Final = 20
CONNECT_SECONDS: Final = 3
RETRY_SECONDS: Final = 8
log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class S3Place:
    """Where the bucket is and who asks; what is empty comes from the usual AWS variables and files."""

    url: str
    endpoint: str = ""
    region: str = ""
    access_key_id: str = ""
    secret_access_key: str = ""

    @property
    def bucket(self) -> str:
        """The bucket's name."""
        return urlsplit(self.url).netloc

    @property
    def prefix(self) -> str:
        """What all names begin with, without slashes at its ends."""
        return urlsplit(self.url).path.strip("/")


@dataclass(frozen=True, slots=True)
class _Copy:
    key: str
    size: int
    modified: datetime

    @property
    def age_seconds(self) -> float:
        return (datetime.now(UTC) - self.modified).total_seconds()


class S3Blobs:
    """Blobs as objects of a bucket; large ones wait in `spool_folder` until their hash is known."""

    def __init__(self, place: S3Place, spool_folder: Path, fresh_seconds: float) -> None:
        """Asks the bucket once. Raises UNAVAILABLE when it does not answer or lets nobody in.

        `fresh_seconds`: how old a copy may be that a new use may rely on; below the grace of sweeps.
        """
        config: S3Config = {"checksum_algorithm": "SHA256"}
        if place.endpoint:
            config["endpoint"] = place.endpoint
        if place.region:
            config["region"] = place.region
        if place.access_key_id:
            config |= {"access_key_id": place.access_key_id, "secret_access_key": place.secret_access_key}
        self._store = S3Store(
            place.bucket,
            prefix=place.prefix or None,
            client_options={
                "timeout": timedelta(seconds=REQUEST_SECONDS),
                "connect_timeout": timedelta(seconds=CONNECT_SECONDS),
                "allow_http": place.endpoint.startswith("http://"),
            },
            retry_config={"max_retries": 4, "retry_timeout": timedelta(seconds=RETRY_SECONDS)},
            config=config,
        )
        self._fresh_seconds = fresh_seconds
        self._known: OrderedDict[str, _Copy] = OrderedDict()
        self._lock = threading.Lock()
        self.spool_folder = spool_folder
        spool_folder.mkdir(parents=True, exist_ok=True)
        next(self.addresses(), None)

    def open_writer(self, sha256: str, size: int) -> BlobWriter:
        """Starts a blob in memory, or in a temporary file when it is long."""
        return _S3Writer(self, sha256, size)

    def adopt(self, file: str, size: int) -> str | None:
        """Returns None: a bucket has no folder to share."""
        return None

    def size_of(self, sha256: str) -> int | None:
        """Asks the bucket."""
        copy = self._newest(check_address(sha256))
        return None if copy is None else copy.size

    def keep(self, sha256: str) -> int | None:
        """Makes a young copy within the bucket unless there is one."""
        copy = self._newest(check_address(sha256))
        if copy is None:
            return None
        if copy.age_seconds > self._fresh_seconds:
            with s3_trouble():
                try:
                    obstore.copy(self._store, copy.key, _new_key(sha256))
                except FileNotFoundError:
                    return None
        return copy.size

    def read(self, sha256: str, offset: int, length: int) -> bytes:
        """Reads a range of an object."""
        check_address(sha256)
        for find in (self._recall, self._newest):
            copy = find(sha256)
            if copy is None:
                continue
            if offset >= copy.size:
                return b""
            end = min(offset + length, copy.size)
            with s3_trouble(), contextlib.suppress(FileNotFoundError):
                return bytes(obstore.get_range(self._store, copy.key, start=offset, end=end))
        raise blob_not_found(sha256)

    def addresses(self) -> Iterator[str]:
        """Lists the bucket."""
        last = ""
        with s3_trouble():
            for page in obstore.list(self._store):
                for entry in page:
                    parts = entry["path"].split("/")
                    address = "".join(parts[:2])
                    # Objects of other makers may lie beside ours.
                    if len(parts) == 3 and ADDRESS.fullmatch(address) and address != last:
                        last = address
                        yield address

    def tidy(self, unused_seconds: float) -> None:
        """Does nothing: spooled files have no names; parts of broken uploads are for the bucket's lifecycle rules."""

    def sweep(self, sha256: str, unused_seconds: float) -> bool:
        """Removes the copies that are old enough; True if none is left."""
        copies = self._copies(check_address(sha256))
        old = [copy.key for copy in copies if copy.age_seconds >= unused_seconds]
        if old:
            with s3_trouble():
                obstore.delete(self._store, old)
            with self._lock:
                self._known.pop(sha256, None)
        return bool(old) and len(old) == len(copies)

    def upload(self, sha256: str, content: bytes | IO[bytes]) -> None:
        """Adds a copy; it is there, whole, when this returns."""
        with s3_trouble():
            obstore.put(self._store, _new_key(sha256), content, chunk_size=PART_BYTES)

    def _copies(self, sha256: str) -> list[_Copy]:
        with s3_trouble():
            entries = obstore.list(self._store, f"{sha256[:2]}/{sha256[2:]}").collect()
        return [_Copy(entry["path"], entry["size"], entry["last_modified"]) for entry in entries]

    def _newest(self, sha256: str) -> _Copy | None:
        copy = max(self._copies(sha256), key=lambda found: found.modified, default=None)
        with self._lock:
            self._known.pop(sha256, None)
            if copy is not None:
                self._known[sha256] = copy
            while len(self._known) > MAX_KNOWN:
                self._known.popitem(last=False)
        return copy

    def _recall(self, sha256: str) -> _Copy | None:
        """Returns the copy that was found last, so that reading a blob in pieces lists its copies once."""
        with self._lock:
            return self._known.get(sha256)


class _S3Writer(CheckedWriter):
    def __init__(self, blobs: S3Blobs, sha256: str, size: int) -> None:
        super().__init__(sha256, size)
        self._blobs = blobs
        self._spool = tempfile.SpooledTemporaryFile(PART_BYTES, dir=str(blobs.spool_folder))  # noqa: SIM115  see _drop

    def __enter__(self) -> BlobWriter:
        return self

    def _store(self, data: bytes) -> None:
        try:
            self._spool.write(data)
        except OSError as error:
            raise make_error("UNAVAILABLE", f"the store cannot take blobs now: {error.strerror}", 5.0) from error

    def _publish(self) -> bool:
        if self._blobs.keep(self._sha256) == self._size:
            return True
        self._spool.seek(0)
        content = self._spool.read() if self._size <= PART_BYTES else cast(IO[bytes], self._spool)
        self._blobs.upload(self._sha256, content)
        return False

    def _drop(self) -> None:
        self._spool.close()


@contextlib.contextmanager
def s3_trouble() -> Iterator[None]:
    """Turns what goes wrong with the bucket into an UNAVAILABLE; an object that is missing stays FileNotFoundError."""
    try:
        yield
    except FileNotFoundError as error:
        # A missing bucket looks like a missing object but for the text; it is no reason to forget blobs.
        if "NoSuchBucket" not in str(error):
            raise
        raise _unavailable(error) from error
    except (BaseError, OSError) as error:
        raise _unavailable(error) from error


def _unavailable(error: Exception) -> TreadleError:
    log.error("bucket_trouble", error=type(error).__name__, cause=str(error).partition("\n")[0][:400])
    return make_error("UNAVAILABLE", "the store cannot use its bucket now; try again", 5.0)


def _new_key(sha256: str) -> str:
    return f"{sha256[:2]}/{sha256[2:]}/{secrets.token_hex(8)}"
