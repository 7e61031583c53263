"""Takes an adapter's files from a PushAdapter stream: stores each as a blob, then checks that they fit the run.

Files that turn out bad stay behind as unused blobs and are swept.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from functools import partial

from treadle.errors import make_error
from treadle.v1 import adapters_pb2, training_pb2
from treadle_store.adapter_files import (
    CONFIG_FILE,
    MAX_CONFIG_BYTES,
    REVISION_FILES,
    WEIGHTS_FILE,
    bad_file,
    check_config,
    check_weights,
)
from treadle_store.blob_io import write_chunk
from treadle_store.blobs import BlobStore, BlobWriter


class Upload:
    """The files of one upload, in the order in which they come."""

    def __init__(self, blobs: BlobStore, max_file_bytes: int) -> None:
        self._blobs = blobs
        self._limits = {CONFIG_FILE: MAX_CONFIG_BYTES, WEIGHTS_FILE: max_file_bytes}
        self.files: list[adapters_pb2.AdapterFile] = []

    async def receive(self, frames: AsyncIterator[adapters_pb2.PushAdapterRequest]) -> None:
        """Stores all files. Raises BAD_FRAME, BAD_ADAPTER_FILE, CHECKSUM_MISMATCH or FRAME_SIZE_MISMATCH."""
        frame = await anext(frames, None)
        while frame is not None:
            if frame.WhichOneof("frame") != "file":
                raise make_error("BAD_FRAME", "a file begins with its AdapterFile, then its chunks follow")
            self._check_announced(frame.file)
            file = frame.file
            with await asyncio.to_thread(self._blobs.open_writer, file.sha256, file.size) as writer:
                frame = await self._receive_chunks(frames, writer)
                await asyncio.to_thread(writer.finish)
            self.files.append(file)
        missing = [path for path in REVISION_FILES if path not in {file.path for file in self.files}]
        if missing:
            raise bad_file(f"{missing[0]} is missing; an adapter is {' and '.join(REVISION_FILES)}")

    async def check(self, run: training_pb2.Run) -> None:
        """Raises BAD_ADAPTER_FILE unless the files are well-formed and fit the run's base and shape."""
        await asyncio.to_thread(self._check, run)

    def _check(self, run: training_pb2.Run) -> None:
        by_path = {file.path: file for file in self.files}
        config, weights = by_path[CONFIG_FILE], by_path[WEIGHTS_FILE]
        check_config(self._blobs.read(config.sha256, 0, config.size), run.base, run.lora)
        read: Callable[[int, int], bytes] = partial(self._blobs.read, weights.sha256)
        check_weights(weights.size, read, run.lora.rank)

    async def _receive_chunks(
        self, frames: AsyncIterator[adapters_pb2.PushAdapterRequest], writer: BlobWriter
    ) -> adapters_pb2.PushAdapterRequest | None:
        """Writes chunks until another kind of frame, which it returns, or None at the end."""
        async for frame in frames:
            if frame.WhichOneof("frame") != "chunk":
                return frame
            await write_chunk(writer, frame.chunk.data, frame.chunk.crc32c)
        return None

    def _check_announced(self, file: adapters_pb2.AdapterFile) -> None:
        if file.path not in self._limits:
            raise bad_file(f"{file.path[:100]!r} is not taken; send {' and '.join(REVISION_FILES)}")
        if file.path in {known.path for known in self.files}:
            raise bad_file(f"{file.path} came twice")
        if file.size > self._limits[file.path]:
            raise bad_file(f"{file.path} has {file.size} bytes, at most {self._limits[file.path]} are taken")
