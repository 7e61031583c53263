"""Content-addressed immutable bytes: the BlobStore port, a local folder and a memory; `s3_blobs` has a bucket.

An address is the lower-case hexadecimal sha256 of the content. All methods block and are meant for worker threads.
LocalBlobs: a blob is written to a temporary file, synced, renamed to its address and the folder is synced, so that
an address that exists names whole content. Knows nothing of what the bytes are.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import secrets
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, Protocol

from treadle.errors import make_error
from treadle_service.logs import get_logger

ADDRESS: Final = re.compile(r"[0-9a-f]{64}")
_INCOMING: Final = re.compile(r"[0-9a-f]{32}")
log = get_logger(__name__)


def check_address(sha256: str) -> str:
    """Returns a blob's address, or raises BAD_VALUE."""
    if ADDRESS.fullmatch(sha256) is None:
        raise make_error("BAD_VALUE", f"{sha256[:80]!r} is not a sha256 in lower-case hexadecimal")
    return sha256


def blob_not_found(sha256: str) -> Exception:
    """Returns the error for an address that holds nothing."""
    return make_error("BLOB_NOT_FOUND", f"there is no blob {sha256}; store it first")


class BlobWriter(Protocol):
    """One blob on its way in; use it as a context manager: leaving without `finish` drops what was written."""

    def __enter__(self) -> "BlobWriter":
        """Returns itself."""

    def __exit__(self, *_: object) -> None:
        """Drops what was not finished."""

    def write(self, data: bytes) -> None:
        """Adds bytes. Raises FRAME_SIZE_MISMATCH when there are more than announced."""

    def finish(self) -> bool:
        """Makes the blob durable and visible; True if it was there. Raises FRAME_SIZE_MISMATCH, CHECKSUM_MISMATCH."""


class BlobStore(Protocol):
    """Keeps blobs by their sha256."""

    def open_writer(self, sha256: str, size: int) -> BlobWriter:
        """Starts a blob of `size` bytes. Raises BAD_VALUE."""

    def adopt(self, file: str, size: int) -> str | None:
        """Makes a blob of a file that somebody else wrote into the incoming folder; returns its address.

        None where there is no such file or folder. Raises BAD_VALUE, FRAME_SIZE_MISMATCH.
        """

    def size_of(self, sha256: str) -> int | None:
        """Returns the length of a blob in bytes, None if it is not there."""

    def keep(self, sha256: str) -> int | None:
        """Does as size_of, and spares the blob from sweeps for a while: a row that names it may follow."""

    def read(self, sha256: str, offset: int, length: int) -> bytes:
        """Returns at most `length` bytes from `offset`; empty at the end. Raises BLOB_NOT_FOUND."""

    def addresses(self) -> Iterator[str]:
        """Yields the addresses of all blobs."""

    def tidy(self, unused_seconds: float) -> None:
        """Removes what was begun that long ago and never became a blob."""

    def sweep(self, sha256: str, unused_seconds: float) -> bool:
        """Removes a blob unless it was written or asked for within `unused_seconds`; True if it was removed."""


class CheckedWriter:
    """What all writers share: length and hash of what came in.

    A store's own writer says where bytes go: `_store` takes them, `_publish` makes them a blob, `_drop` forgets them.
    """

    def __init__(self, sha256: str, size: int) -> None:
        self._sha256 = check_address(sha256)
        self._size = size
        self._written = 0
        self._hash = hashlib.sha256()

    def __exit__(self, *_: object) -> None:
        """Drops what was not finished."""
        self._drop()

    def write(self, data: bytes) -> None:
        """Counts, hashes and stores."""
        self._written += len(data)
        if self._written > self._size:
            raise make_error("FRAME_SIZE_MISMATCH", f"more bytes came than the {self._size} that the header announced")
        self._hash.update(data)
        self._store(data)

    def finish(self) -> bool:
        """Compares length and hash with what was announced, then publishes."""
        if self._written != self._size:
            raise make_error(
                "FRAME_SIZE_MISMATCH", f"{self._written} bytes came, the header announced {self._size}; send it again"
            )
        if self._hash.hexdigest() != self._sha256:
            raise make_error("CHECKSUM_MISMATCH", f"the content is not that of {self._sha256}; send it again")
        return self._publish()

    def _store(self, data: bytes) -> None:
        raise NotImplementedError

    def _publish(self) -> bool:
        raise NotImplementedError

    def _drop(self) -> None:
        raise NotImplementedError


class MemoryBlobs:
    """Blobs in this process's memory, gone with it."""

    def __init__(self) -> None:
        self.contents: dict[str, bytes] = {}
        self.used_at: dict[str, float] = {}

    def open_writer(self, sha256: str, size: int) -> BlobWriter:
        """Starts a blob in memory."""
        return _MemoryWriter(self, sha256, size)

    def adopt(self, file: str, size: int) -> str | None:
        """Returns None: memory is not shared."""
        return None

    def size_of(self, sha256: str) -> int | None:
        """Returns the blob's length."""
        content = self.contents.get(check_address(sha256))
        return None if content is None else len(content)

    def keep(self, sha256: str) -> int | None:
        """Notes the time."""
        size = self.size_of(sha256)
        if size is not None:
            self.used_at[sha256] = time.time()
        return size

    def read(self, sha256: str, offset: int, length: int) -> bytes:
        """Returns a slice of the blob."""
        content = self.contents.get(check_address(sha256))
        if content is None:
            raise blob_not_found(sha256)
        return content[offset : offset + length]

    def addresses(self) -> Iterator[str]:
        """Yields what is there now."""
        yield from list(self.contents)

    def tidy(self, unused_seconds: float) -> None:
        """Does nothing: what was begun goes with its writer."""

    def sweep(self, sha256: str, unused_seconds: float) -> bool:
        """Forgets the blob."""
        if sha256 not in self.contents or time.time() - self.used_at[sha256] < unused_seconds:
            return False
        del self.contents[sha256]
        return True


class _MemoryWriter(CheckedWriter):
    def __init__(self, blobs: MemoryBlobs, sha256: str, size: int) -> None:
        super().__init__(sha256, size)
        self._blobs = blobs
        self._buffer = bytearray()

    def __enter__(self) -> BlobWriter:
        return self

    def _store(self, data: bytes) -> None:
        self._buffer += data

    def _publish(self) -> bool:
        existed = self._sha256 in self._blobs.contents
        self._blobs.contents[self._sha256] = bytes(self._buffer)
        self._blobs.used_at[self._sha256] = time.time()
        return existed

    def _drop(self) -> None:
        self._buffer.clear()


class _FolderLock:
    """One thread of one process at a time, among all that lock the same file; use it as a context manager."""

    def __init__(self, path: Path) -> None:
        self._threads = threading.Lock()
        self._file = path.open("wb")

    def __enter__(self) -> None:
        self._threads.acquire()
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        fcntl.flock(self._file, fcntl.LOCK_UN)
        self._threads.release()


class LocalBlobs:
    """Blobs as files `ab/cdef...` under a folder that one store and tools beside it use."""

    def __init__(self, folder: Path, *, beside_a_store: bool = False) -> None:
        """Makes the folder; clears away what a crash left half-written, unless a store may be writing it now."""
        self._folder = folder
        self._incoming = folder / "incoming"
        self._incoming.mkdir(parents=True, exist_ok=True)
        # Held from a file's appearance until its name is durable, and while its age decides over it: whoever is told
        # that a blob is there can rely on it.
        self.lock = _FolderLock(folder / "lock")
        for leftover in () if beside_a_store else self._incoming.iterdir():
            leftover.unlink()
        for first in range(256):
            (folder / f"{first:02x}").mkdir(exist_ok=True)
        sync_folder(folder)
        sync_folder(folder.parent)

    def open_writer(self, sha256: str, size: int) -> BlobWriter:
        """Starts a blob in a temporary file."""
        return _LocalWriter(self, sha256, size, self._incoming / secrets.token_hex(16))

    def adopt(self, file: str, size: int) -> str | None:
        """Hashes and syncs the file, then renames it to its address."""
        if _INCOMING.fullmatch(file) is None:
            raise make_error("BAD_VALUE", f"{file[:80]!r} is not the name of an incoming file")
        path = self._incoming / file
        try:
            # Not through a link: it might lead out of the folder.
            opened = os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise make_error("BAD_VALUE", f"the incoming file {file} cannot be opened: {error.strerror}") from error
        with opened, _disk_trouble():
            found = os.fstat(opened.fileno()).st_size
            if found != size:
                raise make_error("FRAME_SIZE_MISMATCH", f"{found} bytes came, {size} were announced; send it again")
            # The disk and a core at the same time: each takes about as long as the other.
            with ThreadPoolExecutor(1) as pool:
                synced = pool.submit(os.fsync, opened.fileno())
                sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
                synced.result()
            with self.lock:
                path.replace(self.path_of(sha256))
                sync_folder(self.path_of(sha256).parent)
            return sha256

    def size_of(self, sha256: str) -> int | None:
        """Returns the file's length."""
        with contextlib.suppress(FileNotFoundError):
            return self.path_of(sha256).stat().st_size
        return None

    def keep(self, sha256: str) -> int | None:
        """Renews the file's time."""
        path = self.path_of(sha256)
        with _disk_trouble(), self.lock, contextlib.suppress(FileNotFoundError):
            os.utime(path)
            return path.stat().st_size
        return None

    def read(self, sha256: str, offset: int, length: int) -> bytes:
        """Returns a part of the file."""
        try:
            with _disk_trouble(), self.path_of(sha256).open("rb") as file:
                file.seek(offset)
                return file.read(length)
        except FileNotFoundError:
            raise blob_not_found(sha256) from None

    def addresses(self) -> Iterator[str]:
        """Walks the folder."""
        for first in range(256):
            prefix = f"{first:02x}"
            for entry in (self._folder / prefix).iterdir():
                # What somebody else left there is not ours to judge.
                if ADDRESS.fullmatch(prefix + entry.name):
                    yield prefix + entry.name

    def tidy(self, unused_seconds: float) -> None:
        """Unlinks files that were left in the incoming folder."""
        for leftover in self._incoming.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if time.time() - leftover.stat().st_mtime >= unused_seconds:
                    leftover.unlink()

    def sweep(self, sha256: str, unused_seconds: float) -> bool:
        """Unlinks the file."""
        path = self.path_of(sha256)
        with self.lock, contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime >= unused_seconds:
                path.unlink()
                return True
        return False

    def path_of(self, sha256: str) -> Path:
        """Returns where a blob lies."""
        check_address(sha256)
        return self._folder / sha256[:2] / sha256[2:]


class _LocalWriter(CheckedWriter):
    def __init__(self, blobs: LocalBlobs, sha256: str, size: int, temporary: Path) -> None:
        super().__init__(sha256, size)
        self._blobs = blobs
        self._temporary = temporary
        with _disk_trouble():
            self._file = temporary.open("xb", buffering=0)

    def __enter__(self) -> BlobWriter:
        return self

    def _store(self, data: bytes) -> None:
        rest = memoryview(data)
        with _disk_trouble():
            while rest:
                rest = rest[self._file.write(rest) :]

    def _publish(self) -> bool:
        path = self._blobs.path_of(self._sha256)
        with _disk_trouble():
            os.fsync(self._file.fileno())
            with self._blobs.lock:
                existed = path.exists() and path.stat().st_size == self._size
                # Harmless where the same content is there, and repairs a file that was damaged from outside.
                self._temporary.replace(path)
                sync_folder(path.parent)
        return existed

    def _drop(self) -> None:
        self._file.close()
        # Where even this fails, the next start clears it away.
        with contextlib.suppress(OSError):
            self._temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _disk_trouble() -> Iterator[None]:
    """Turns a full or failing disk into an UNAVAILABLE: nothing was promised, the caller may try again."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        log.error("disk_trouble", cause=str(error))
        raise make_error("UNAVAILABLE", f"the store cannot use its blobs now: {error.strerror}", 5.0) from error


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
