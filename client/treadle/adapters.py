"""Saved adapters: listing, reading, deleting, and moving them as folders of PEFT files.

Every chunk is checked by crc32c and every file by sha256; a folder appears under its name only when it is whole.
Knows nothing of what is in the files.
"""

import asyncio
import hashlib
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, BinaryIO, Final

import google_crc32c

from treadle.channel import Transport
from treadle.convert import adapter_from
from treadle.errors import BadInputError, ConflictError, ServerError
from treadle.names import check_id, parse_adapter, parse_run
from treadle.records import AdapterInfo
from treadle.v1 import adapters_pb2, adapters_pb2_grpc

CHUNK_BYTES: Final = 2**20
PEFT_FILES: Final = ("adapter_config.json", "adapter_model.safetensors")
_PAGE_SIZE: Final = 500


class AdapterCalls:
    """The calls of a service client that concern saved adapters; they wait for their answer."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._adapters = adapters_pb2_grpc.AdapterServiceStub(transport.ops_channel)
        self._files = adapters_pb2_grpc.AdapterServiceStub(transport.blobs_channel)

    def list_revisions(self, run: str = "") -> list[AdapterInfo]:
        """Lists the revisions of a run, or of all runs, newest first."""
        found: list[AdapterInfo] = []
        token = ""
        while True:
            request = adapters_pb2.ListRevisionsRequest(run=run, page_size=_PAGE_SIZE, page_token=token)
            page: adapters_pb2.ListRevisionsResponse = self._transport.call(self._adapters.ListRevisions, request)
            found.extend(adapter_from(adapter) for adapter in page.revisions)
            token = page.next_page_token
            if not token:
                return found

    def list_checkpoints(self, run: str = "") -> list[AdapterInfo]:
        """Lists the checkpoints of a run, or of all runs, newest first."""
        found: list[AdapterInfo] = []
        token = ""
        while True:
            request = adapters_pb2.ListCheckpointsRequest(run=run, page_size=_PAGE_SIZE, page_token=token)
            page: adapters_pb2.ListCheckpointsResponse = self._transport.call(self._adapters.ListCheckpoints, request)
            found.extend(adapter_from(adapter) for adapter in page.checkpoints)
            token = page.next_page_token
            if not token:
                return found

    def get_adapter(self, name: str) -> AdapterInfo:
        """Returns one revision or checkpoint; raises NotFoundError."""
        return adapter_from(self._get_adapter(name))

    def delete_adapter(self, name: str) -> None:
        """Deletes one revision or checkpoint; raises NotFoundError."""
        if parse_adapter(name).kind == "revisions":
            self._transport.call(self._adapters.DeleteRevision, adapters_pb2.DeleteRevisionRequest(name=name))
        else:
            self._transport.call(self._adapters.DeleteCheckpoint, adapters_pb2.DeleteCheckpointRequest(name=name))

    def pull_adapter(self, name: str, folder: str | Path) -> Path:
        """Downloads a revision or checkpoint as a PEFT folder, which must not exist or be empty; returns it."""
        parse_adapter(name)
        target = Path(folder)
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise ConflictError(f"{target} is there already; give a folder that is empty or does not exist")
        target.parent.mkdir(parents=True, exist_ok=True)
        self._transport.wait(self._transport.retried(lambda: self._pull(name, target)))
        return target

    def push_adapter(self, run: str, folder: str | Path, revision_id: str) -> AdapterInfo:
        """Uploads a PEFT folder as a revision of a run whose base and shape it fits; returns the revision."""
        header = adapters_pb2.PushHeader(run=str(parse_run(run)), revision_id=check_id(revision_id))
        files = [Path(folder) / name for name in PEFT_FILES]
        for path in files:
            if not path.is_file():
                raise BadInputError(
                    f"{path} is missing; a PEFT folder has {' and '.join(PEFT_FILES)}", "BAD_ADAPTER_FILE"
                )

        async def attempt() -> adapters_pb2.PushAdapterResponse:
            # A stub's stream call takes any async iterator; the stub files do not say so for its aio form.
            push: Callable[..., Any] = self._files.PushAdapter
            answer: adapters_pb2.PushAdapterResponse = await push(
                _push_frames(header, files), metadata=self._transport.metadata
            )
            return answer

        return adapter_from(self._transport.wait(self._transport.retried(attempt)).revision)

    def _get_adapter(self, name: str) -> adapters_pb2.Adapter:
        if parse_adapter(name).kind == "revisions":
            revision: adapters_pb2.GetRevisionResponse = self._transport.call(
                self._adapters.GetRevision, adapters_pb2.GetRevisionRequest(name=name)
            )
            return revision.revision
        checkpoint: adapters_pb2.GetCheckpointResponse = self._transport.call(
            self._adapters.GetCheckpoint, adapters_pb2.GetCheckpointRequest(name=name)
        )
        return checkpoint.checkpoint

    async def _pull(self, name: str, target: Path) -> None:
        """Writes all files beside the target and renames the folder when it is whole."""
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        stream: Callable[..., Any] = self._files.PullAdapter
        call = stream(adapters_pb2.PullAdapterRequest(name=name), metadata=self._transport.metadata)
        files: list[_IncomingFile] = []
        try:
            async for response in call:
                frame = response.WhichOneof("frame")
                if frame == "file":
                    files.append(_IncomingFile(partial, response.file))
                elif frame == "chunk":
                    if not files:
                        raise ServerError("a chunk came before its file's header", "FRAME_SIZE_MISMATCH")
                    await asyncio.to_thread(files[-1].write, response.chunk)
            for file in files:
                await asyncio.to_thread(file.finish)
            partial.chmod(0o755)
            os.replace(partial, target)
        finally:
            call.cancel()
            for file in files:
                file.close()
            shutil.rmtree(partial, ignore_errors=True)


class _IncomingFile:
    """A file that is being received; checks what it gets."""

    def __init__(self, folder: Path, header: adapters_pb2.AdapterFile) -> None:
        if Path(header.path).name != header.path or header.path in ("", ".", ".."):
            raise ServerError(f"the service sent a file called {header.path[:100]!r}", "BAD_ADAPTER_FILE")
        self._header = header
        self._file: BinaryIO = (folder / header.path).open("xb")
        self._digest = hashlib.sha256()
        self._size = 0

    def write(self, chunk: adapters_pb2.FileChunk) -> None:
        """Appends a chunk; raises ServerError when its checksum does not fit."""
        data = chunk.data
        if google_crc32c.value(data) != chunk.crc32c:
            raise ServerError(f"a chunk of {self._header.path} was damaged on its way", "CHECKSUM_MISMATCH")
        self._file.write(data)
        self._digest.update(data)
        self._size += len(data)

    def finish(self) -> None:
        """Checks the whole file and forces it to disk; raises ServerError when it is not what was announced."""
        if (self._size, self._digest.hexdigest()) != (self._header.size, self._header.sha256):
            raise ServerError(f"{self._header.path} is not what the service announced", "CHECKSUM_MISMATCH")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file; may be called twice."""
        self._file.close()


async def _push_frames(
    header: adapters_pb2.PushHeader, files: list[Path]
) -> AsyncIterator[adapters_pb2.PushAdapterRequest]:
    yield adapters_pb2.PushAdapterRequest(header=header)
    for path in files:
        digest = await asyncio.to_thread(_sha256, path)
        file = adapters_pb2.AdapterFile(path=path.name, size=path.stat().st_size, sha256=digest)
        yield adapters_pb2.PushAdapterRequest(file=file)
        with path.open("rb") as source:
            while data := await asyncio.to_thread(source.read, CHUNK_BYTES):
                chunk = adapters_pb2.FileChunk(crc32c=google_crc32c.value(data), data=data)
                yield adapters_pb2.PushAdapterRequest(chunk=chunk)


def _sha256(path: Path) -> str:
    with path.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()
