"""A saved adapter as a zip archive, made while it is downloaded: nothing is gathered in memory or on disk.

Knows nothing of where the files come from.
"""

import zipfile
from collections.abc import AsyncIterable, AsyncIterator
from typing import IO, Any, Final

import google_crc32c

from treadle.errors import make_error
from treadle.v1 import adapters_pb2

_WHEN: Final = (1980, 1, 1, 0, 0, 0)


class _Sink:
    """Takes what the zip writer writes, until it is fetched; cannot seek, so sizes follow the contents."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._position = 0

    def write(self, data: bytes) -> int:
        """Takes bytes."""
        self._parts.append(bytes(data))
        self._position += len(data)
        return len(data)

    def tell(self) -> int:
        """Tells how much was written."""
        return self._position

    def flush(self) -> None:
        """Does nothing: all is there."""

    def take(self) -> bytes:
        """Returns what was written since the last call."""
        parts, self._parts = self._parts, []
        return b"".join(parts)


async def zipped(frames: AsyncIterable[adapters_pb2.PullAdapterResponse], folder: str) -> AsyncIterator[bytes]:
    """Yields a zip archive of the files of PullAdapter, below one folder. Raises CHECKSUM_MISMATCH."""
    sink = _Sink()
    # Any: the archive writes to anything that has write, tell and flush.
    target: Any = sink
    entry: IO[bytes] | None = None
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        async for frame in frames:
            kind = frame.WhichOneof("frame")
            if kind == "file":
                if entry is not None:
                    entry.close()
                info = zipfile.ZipInfo(f"{folder}/{frame.file.path}", _WHEN)
                entry = archive.open(info, "w", force_zip64=True)
            elif kind == "chunk" and entry is not None:
                if google_crc32c.value(frame.chunk.data) != frame.chunk.crc32c:
                    raise make_error("CHECKSUM_MISMATCH", "a chunk was damaged on its way")
                entry.write(frame.chunk.data)
                yield sink.take()
        if entry is not None:
            entry.close()
    yield sink.take()
