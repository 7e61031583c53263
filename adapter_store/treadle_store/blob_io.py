"""Blobs to and from streams of chunks: blocking file work goes to threads, each chunk's crc32c is checked.

Knows neither which RPC the chunks came by nor what they mean.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import google_crc32c

from treadle.errors import TreadleError, make_error
from treadle_service import blob_delta
from treadle_store.blobs import BlobStore, BlobWriter, blob_not_found

CHUNK_BYTES: Final = 2**20
_HEARING_FRAMES: Final = 64
_HEARING_SECONDS: Final = 1.0


@asynccontextmanager
async def hearing_out(frames: AsyncIterator[object]) -> AsyncIterator[None]:
    """Takes in what a caller is still sending before its stream is refused: cut short, it may not see the reason."""
    try:
        yield
    except TreadleError:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_HEARING_SECONDS):
                for _ in range(_HEARING_FRAMES):
                    if await anext(frames, None) is None:
                        break
        raise


def check_chunk(data: bytes, crc32c: int) -> None:
    """Raises FRAME_TOO_LARGE or CHECKSUM_MISMATCH unless the chunk is one."""
    if len(data) > CHUNK_BYTES:
        raise make_error("FRAME_TOO_LARGE", f"a chunk has {len(data)} bytes, at most {CHUNK_BYTES} are taken")
    if google_crc32c.value(data) != crc32c:
        raise make_error("CHECKSUM_MISMATCH", "a chunk was damaged on its way (crc32c); send it again")


async def write_chunk(writer: BlobWriter, data: bytes, crc32c: int) -> None:
    """Checks a chunk and adds it to a blob."""
    await asyncio.to_thread(_write_checked, writer, data, crc32c)


async def read_chunks(blobs: BlobStore, sha256: str, offset: int) -> AsyncIterator[tuple[bytes, int]]:
    """Yields the rest of a blob from `offset` as chunks with their crc32c."""
    while True:
        data, crc32c = await asyncio.to_thread(_read_summed, blobs, sha256, offset)
        if not data:
            return
        yield data, crc32c
        offset += len(data)


async def read_differences(blobs: BlobStore, sha256: str, base_sha256: str) -> AsyncIterator[tuple[bytes, int]]:
    """Yields a blob as differences to another of the same length, chunk by chunk, with their crc32c."""
    offset = 0
    while True:
        data, delta, crc32c = await asyncio.to_thread(_read_difference, blobs, sha256, base_sha256, offset)
        if not data:
            return
        yield delta, crc32c
        offset += data


async def require_blob(blobs: BlobStore, sha256: str, size: int | None = None) -> None:
    """Keeps a blob that a row is about to name; raises BLOB_NOT_FOUND unless it is there, with this length if given."""
    found = await asyncio.to_thread(blobs.keep, sha256)
    if found is None:
        raise blob_not_found(sha256)
    if size is not None and found != size:
        raise make_error("BLOB_NOT_FOUND", f"blob {sha256} has {found} bytes, not {size}; store it again")


def _write_checked(writer: BlobWriter, data: bytes, crc32c: int) -> None:
    check_chunk(data, crc32c)
    writer.write(data)


def _read_summed(blobs: BlobStore, sha256: str, offset: int) -> tuple[bytes, int]:
    data = blobs.read(sha256, offset, CHUNK_BYTES)
    return data, google_crc32c.value(data)


def _read_difference(blobs: BlobStore, sha256: str, base_sha256: str, offset: int) -> tuple[int, bytes, int]:
    """Returns how many bytes of the blob a difference covers, the difference, and its crc32c."""
    data, base = blobs.read(sha256, offset, CHUNK_BYTES), blobs.read(base_sha256, offset, CHUNK_BYTES)
    delta = blob_delta.encode(base, data)
    return len(data), delta, google_crc32c.value(delta)
