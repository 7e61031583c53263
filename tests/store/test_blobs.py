"""The BlobStore contract for all stores, and what is special about files, buckets and the wire."""

import hashlib
import os
import secrets
import time
from pathlib import Path

import pytest

from tests.store.conftest import blob_chunks, reason_of
from tests.support.s3 import ACCESS_KEY_ID, REGION, SECRET_ACCESS_KEY, S3Server
from treadle.errors import TreadleError
from treadle.internal.v1 import blobs_pb2
from treadle_store.blobs import BlobStore, LocalBlobs, MemoryBlobs
from treadle_store.s3_blobs import S3Blobs, S3Place

CONTENT = os.urandom(3 * 2**20 + 17)
# Longer than what is sent in one piece.
LONG = os.urandom(20 * 2**20 + 1)
ADDRESS = hashlib.sha256(CONTENT).hexdigest()


def put(blobs: BlobStore, content: bytes, address: str | None = None, size: int | None = None) -> bool:
    address = address or hashlib.sha256(content).hexdigest()
    with blobs.open_writer(address, len(content) if size is None else size) as writer:
        writer.write(content)
        return writer.finish()


def bucket(server: S3Server, folder: Path, fresh_seconds: float = 1800, endpoint: str = "") -> S3Blobs:
    """A new bucket with a prefix."""
    url = f"s3://{server.new_bucket()}/some/prefix"
    place = S3Place(url, endpoint or server.endpoint, REGION, ACCESS_KEY_ID, SECRET_ACCESS_KEY)
    return S3Blobs(place, folder / "incoming", fresh_seconds)


@pytest.fixture(params=["memory", "folder", "s3"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    if request.param == "s3":
        return bucket(request.getfixturevalue("s3"), tmp_path)
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

    def test_a_long_blob_comes_back_whole(self, blobs: BlobStore) -> None:
        """Also when it takes several pieces to bring it in."""
        address = hashlib.sha256(LONG).hexdigest()
        put(blobs, LONG)
        pieces = [blobs.read(address, start, 2**22) for start in range(0, len(LONG), 2**22)]
        assert b"".join(pieces) == LONG

    def test_many_blobs_are_all_listed(self, blobs: BlobStore) -> None:
        """Each once, in whatever order."""
        contents = [b"%d" % i for i in range(40)]
        for content in contents:
            put(blobs, content)
        assert sorted(blobs.addresses()) == sorted(hashlib.sha256(content).hexdigest() for content in contents)

    def test_a_repeat_is_harmless(self, blobs: BlobStore) -> None:
        """It says that the blob was there."""
        put(blobs, CONTENT)
        assert put(blobs, CONTENT) is True

    def test_an_empty_blob_is_a_blob(self, blobs: BlobStore) -> None:
        """It has an address too."""
        put(blobs, b"")
        address = hashlib.sha256(b"").hexdigest()
        assert (blobs.size_of(address), blobs.keep(address), blobs.read(address, 0, 10)) == (0, 0, b"")

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
        assert blobs.keep(ADDRESS) is None
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


def test_keeping_an_old_blob_renews_its_grace(tmp_path: Path) -> None:
    """Who was told that a blob is kept has time to refer to it; asking for its size alone renews nothing."""
    blobs = LocalBlobs(tmp_path / "blobs")
    put(blobs, b"old")
    address = hashlib.sha256(b"old").hexdigest()
    for renew, swept in [(blobs.keep, False), (blobs.size_of, True)]:
        os.utime(blobs.path_of(address), (time.time() - 9999,) * 2)
        renew(address)
        assert blobs.sweep(address, 3600) is swept


def test_keeping_an_old_object_makes_a_young_copy(s3: S3Server, tmp_path: Path) -> None:
    """A sweep takes the old copy and leaves the young one, and a reader that knew the old one finds the other."""
    blobs = bucket(s3, tmp_path, fresh_seconds=1.0)
    put(blobs, b"old")
    address = hashlib.sha256(b"old").hexdigest()
    assert blobs.read(address, 0, 1) == b"o"
    time.sleep(2.5)  # a bucket's times are whole seconds
    assert (blobs.keep(address), blobs.keep(address)) == (3, 3)
    assert blobs.sweep(address, 2.0) is False
    assert blobs.read(address, 1, 2) == b"ld"
    assert list(blobs.addresses()) == [address]
    time.sleep(2.5)
    assert blobs.sweep(address, 2.0) is True
    assert blobs.keep(address) is None


def test_a_long_upload_that_is_dropped_leaves_no_file(s3: S3Server, tmp_path: Path) -> None:
    """What waits for its hash lies in a temporary file without a name."""
    blobs = bucket(s3, tmp_path)
    with blobs.open_writer(ADDRESS, len(LONG)) as writer:
        writer.write(LONG)
    assert list((tmp_path / "incoming").iterdir()) == []
    assert list(blobs.addresses()) == []


def test_a_bucket_that_is_not_there_is_said_so(s3: S3Server, tmp_path: Path) -> None:
    """At the start, not at the first blob."""
    place = S3Place("s3://no-such-bucket", s3.endpoint, REGION, ACCESS_KEY_ID, SECRET_ACCESS_KEY)
    with pytest.raises(TreadleError) as raised:
        S3Blobs(place, tmp_path / "incoming", 60)
    assert raised.value.reason == "UNAVAILABLE"


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


def test_a_tool_beside_a_store_leaves_uploads_alone(tmp_path: Path) -> None:
    """What is being written when it opens the folder becomes a blob; only what is old is removed."""
    blobs = LocalBlobs(tmp_path / "blobs")
    with blobs.open_writer(ADDRESS, len(CONTENT)) as writer:
        writer.write(CONTENT[:1000])
        beside = LocalBlobs(tmp_path / "blobs", beside_a_store=True)
        beside.tidy(3600)
        writer.write(CONTENT[1000:])
        writer.finish()
    assert beside.read(ADDRESS, 0, len(CONTENT)) == CONTENT


def test_files_of_strangers_are_no_blobs(tmp_path: Path) -> None:
    """They are not listed, so that no sweep stumbles over them."""
    blobs = LocalBlobs(tmp_path / "blobs")
    put(blobs, CONTENT)
    (tmp_path / "blobs" / "ab" / "notes.txt").write_text("mine")
    assert list(blobs.addresses()) == [ADDRESS]


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
