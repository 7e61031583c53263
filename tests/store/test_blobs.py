"""The BlobStore contract for both stores, and what is special about files and about the wire."""

import hashlib
import os
import secrets
import time
from pathlib import Path

import pytest

from tests.store.conftest import blob_chunks, reason_of
from treadle.errors import TreadleError
from treadle.internal.v1 import blobs_pb2
from treadle_store.blobs import BlobStore, LocalBlobs, MemoryBlobs

CONTENT = os.urandom(3 * 2**20 + 17)
ADDRESS = hashlib.sha256(CONTENT).hexdigest()


def put(blobs: BlobStore, content: bytes, address: str | None = None, size: int | None = None) -> bool:
    address = address or hashlib.sha256(content).hexdigest()
    with blobs.open_writer(address, len(content) if size is None else size) as writer:
        writer.write(content)
        return writer.finish()


@pytest.fixture(params=["memory", "local"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    return MemoryBlobs() if request.param == "memory" else LocalBlobs(tmp_path / "blobs")


class TestEveryBlobStore:
    """What every BlobStore does."""

    def test_what_is_put_is_read(self, blobs: BlobStore) -> None:
        """Whole, in parts, and past the end."""
        assert put(blobs, CONTENT) is False
        assert blobs.size_of(ADDRESS) == len(CONTENT)
        assert blobs.read(ADDRESS, 0, len(CONTENT)) == CONTENT
        assert blobs.read(ADDRESS, 5, 10) == CONTENT[5:15]
        assert blobs.read(ADDRESS, len(CONTENT), 10) == b""
        assert list(blobs.addresses()) == [ADDRESS]

    def test_a_repeat_is_harmless(self, blobs: BlobStore) -> None:
        """It says that the blob was there."""
        put(blobs, CONTENT)
        assert put(blobs, CONTENT) is True

    def test_an_empty_blob_is_a_blob(self, blobs: BlobStore) -> None:
        """It has an address too."""
        put(blobs, b"")
        assert blobs.size_of(hashlib.sha256(b"").hexdigest()) == 0

    @pytest.mark.parametrize(
        ("content", "size", "reason"),
        [
            (b"wrong", 5, "CHECKSUM_MISMATCH"),
            (CONTENT, len(CONTENT) - 1, "FRAME_SIZE_MISMATCH"),
            (CONTENT[:-1], len(CONTENT), "FRAME_SIZE_MISMATCH"),
        ],
    )
    def test_wrong_content_never_appears(self, blobs: BlobStore, content: bytes, size: int, reason: str) -> None:
        """A mismatch is refused and leaves nothing."""
        with pytest.raises(TreadleError) as raised:
            put(blobs, content, ADDRESS, size)
        assert raised.value.reason == reason
        assert blobs.size_of(ADDRESS) is None
        assert list(blobs.addresses()) == []

    def test_an_unfinished_blob_never_appears(self, blobs: BlobStore) -> None:
        """Leaving early drops what was written."""
        with blobs.open_writer(ADDRESS, len(CONTENT)) as writer:
            writer.write(CONTENT)
        assert blobs.size_of(ADDRESS) is None

    def test_a_missing_blob_is_said_to_be_missing(self, blobs: BlobStore) -> None:
        """Reading raises BLOB_NOT_FOUND."""
        with pytest.raises(TreadleError) as raised:
            blobs.read(ADDRESS, 0, 1)
        assert raised.value.reason == "BLOB_NOT_FOUND"

    @pytest.mark.parametrize("address", ["", "../../etc/passwd", "A" * 64, "0" * 63, "0" * 65])
    def test_an_address_is_a_sha256(self, blobs: BlobStore, address: str) -> None:
        """Nothing else reaches the file system."""
        for call in (lambda: blobs.size_of(address), lambda: blobs.read(address, 0, 1), lambda: put(blobs, b"", "x")):
            with pytest.raises(TreadleError) as raised:
                call()
            assert raised.value.reason == "BAD_VALUE"

    def test_a_sweep_spares_what_is_in_use(self, blobs: BlobStore) -> None:
        """A fresh blob stays; with no grace it goes."""
        put(blobs, CONTENT)
        assert not blobs.sweep(ADDRESS, 3600)
        assert blobs.sweep(ADDRESS, 0)
        assert not blobs.sweep(ADDRESS, 0)
        assert blobs.size_of(ADDRESS) is None


def test_asking_for_an_old_blob_renews_its_grace(tmp_path: Path) -> None:
    """Who was told that a blob is there has time to refer to it."""
    blobs = LocalBlobs(tmp_path / "blobs")
    put(blobs, b"old")
    address = hashlib.sha256(b"old").hexdigest()
    os.utime(blobs.path_of(address), (time.time() - 9999,) * 2)
    blobs.size_of(address)
    assert not blobs.sweep(address, 3600)


def test_torn_writes_of_a_crash_are_cleared(tmp_path: Path) -> None:
    """Half-written files go at the next start; a file that lost its tail is replaced by the next put."""
    blobs = LocalBlobs(tmp_path / "blobs")
    writer = blobs.open_writer(ADDRESS, len(CONTENT))
    writer.write(CONTENT[:1000])
    (tmp_path / "blobs" / ADDRESS[:2] / ADDRESS[2:]).write_bytes(CONTENT[:500])
    reopened = LocalBlobs(tmp_path / "blobs")
    assert list((tmp_path / "blobs" / "incoming").iterdir()) == []
    assert put(reopened, CONTENT) is False
    assert reopened.read(ADDRESS, 0, len(CONTENT)) == CONTENT


def frames(content: bytes, address: str = "", size: int | None = None) -> list[blobs_pb2.PutBlobRequest]:
    address = address or hashlib.sha256(content).hexdigest()
    header = blobs_pb2.BlobHeader(sha256=address, size=len(content) if size is None else size)
    chunks = [blobs_pb2.PutBlobRequest(chunk=chunk) for chunk in blob_chunks(content)]
    return [blobs_pb2.PutBlobRequest(header=header), *chunks]


async def test_a_blob_travels_in_chunks(store):
    """Put, stat, get from an offset; a second put says that it was there."""
    assert not (await store.blobs.PutBlob(iter(frames(CONTENT)))).existed
    assert (await store.blobs.PutBlob(iter(frames(CONTENT)))).existed
    stat = await store.blobs.StatBlob(blobs_pb2.StatBlobRequest(sha256=ADDRESS))
    assert (stat.complete, stat.size) == (True, len(CONTENT))
    call = store.blobs.GetBlob(blobs_pb2.GetBlobRequest(sha256=ADDRESS, offset=2**20 + 1))
    answers = [answer async for answer in call]
    assert answers[0].header.size == len(CONTENT)
    assert b"".join(answer.chunk.data for answer in answers[1:]) == CONTENT[2**20 + 1 :]
    assert max(len(answer.chunk.data) for answer in answers) <= 2**20


async def test_bad_streams_are_refused(store):
    """Each mistake has its reason and leaves no blob."""
    damaged = frames(CONTENT)
    damaged[2].chunk.crc32c ^= 1
    long_chunk = [frames(b"")[0], blobs_pb2.PutBlobRequest(chunk=next(blob_chunks(b"x" * (2**20 + 1), 2**21)))]
    for bad, reason in [
        (damaged, "CHECKSUM_MISMATCH"),
        (frames(b"other", ADDRESS), "CHECKSUM_MISMATCH"),
        (frames(CONTENT, ADDRESS, 10), "FRAME_SIZE_MISMATCH"),
        (frames(CONTENT, ADDRESS)[:2], "FRAME_SIZE_MISMATCH"),
        (frames(CONTENT)[1:], "BAD_FRAME"),
        (frames(CONTENT)[:1] * 2, "BAD_FRAME"),
        ([], "BAD_FRAME"),
        (long_chunk, "FRAME_TOO_LARGE"),
        (frames(b"", "../x"), "BAD_VALUE"),
    ]:
        assert await reason_of(store.blobs.PutBlob(iter(bad))) == reason
    assert not (await store.blobs.StatBlob(blobs_pb2.StatBlobRequest(sha256=ADDRESS))).complete
    assert await reason_of(store.blobs.GetBlob(blobs_pb2.GetBlobRequest(sha256=ADDRESS))) == "BLOB_NOT_FOUND"


def incoming(tmp_path: Path, content: bytes = CONTENT) -> Path:
    path = tmp_path / "blobs" / "incoming" / secrets.token_hex(16)
    path.write_bytes(content)
    return path


def test_a_file_in_the_shared_folder_is_adopted_in_place(tmp_path: Path) -> None:
    """It becomes a blob without being copied; a second one of the same content changes nothing."""
    blobs = LocalBlobs(tmp_path / "blobs")
    path = incoming(tmp_path)
    inode = path.stat().st_ino
    assert blobs.adopt(path.name, len(CONTENT)) == ADDRESS
    assert blobs.path_of(ADDRESS).stat().st_ino == inode
    assert blobs.read(ADDRESS, 0, len(CONTENT)) == CONTENT
    assert blobs.adopt(incoming(tmp_path).name, len(CONTENT)) == ADDRESS
    assert list((tmp_path / "blobs" / "incoming").iterdir()) == []
    assert list(blobs.addresses()) == [ADDRESS]


def test_what_is_no_whole_incoming_file_is_not_adopted(tmp_path: Path) -> None:
    """Absent ones are left to PutBlob; a wrong length, a link and a path are refused."""
    blobs = LocalBlobs(tmp_path / "blobs")
    assert blobs.adopt("0" * 32, 5) is None
    with pytest.raises(TreadleError, match="FRAME_SIZE_MISMATCH"):
        blobs.adopt(incoming(tmp_path).name, len(CONTENT) + 1)
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "blobs" / "incoming" / ("a" * 32)).symlink_to(tmp_path / "secret")
    with pytest.raises(TreadleError, match="BAD_VALUE"):
        blobs.adopt("a" * 32, 6)
    with pytest.raises(TreadleError, match="BAD_VALUE"):
        blobs.adopt("../../secret", 6)
    assert list(blobs.addresses()) == []
