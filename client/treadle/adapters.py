"""Saved adapters: listing, reading, deleting, and moving them as folders of PEFT files.

Every chunk is checked by crc32c and every file by sha256; a folder appears under its name only when it is whole.
Knows nothing of what is in the files.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Final

import google_crc32c

from treadle.channel import Transport
from treadle.convert import adapter_from
from treadle.downloads import Download, Progress
from treadle.errors import BadInputError, ConflictError
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

    def set_adapter_public(self, name: str, *, public: bool) -> AdapterInfo:
        """Lets every tenant of the deployment read a revision or checkpoint of yours, or only you again.

        Who may read it samples from it, starts runs from it, downloads and copies it. What others have started from it
        or copied stays theirs. Raises NotFoundError.
        """
        request = adapters_pb2.SetAdapterPublicRequest(name=name, public=public)
        answer: adapters_pb2.SetAdapterPublicResponse = self._transport.call(self._adapters.SetAdapterPublic, request)
        return adapter_from(answer.adapter)

    def pull_adapter(self, name: str, folder: str | Path, on_progress: Progress | None = None) -> Path:
        """Downloads a revision or checkpoint as a PEFT folder, which must not exist or be empty; returns it.

        A broken connection is taken up again where it broke, also by a later call with the same folder.
        `on_progress(done, total)` hears of bytes, from the SDK's own thread.
        """
        info = self.get_adapter(name)
        target = Path(folder)
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise ConflictError(f"{target} is there already; give a folder that is empty or does not exist")
        download = Download(info, target, on_progress)
        self._transport.wait(self._transport.retried(lambda: self._pull(download)))
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

    async def _pull(self, download: Download) -> None:
        stream: Callable[..., Any] = self._files.PullAdapter
        for path, offset in download.begin():
            request = adapters_pb2.PullAdapterRequest(name=download.name, path=path, offset=offset)
            call = stream(request, metadata=self._transport.metadata)
            try:
                async for response in call:
                    await asyncio.to_thread(download.take, response)
            finally:
                call.cancel()
                download.close()
        await asyncio.to_thread(download.finish)


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
