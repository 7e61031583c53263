"""The sampler's calls to the adapter store: look a revision up, fetch its files, say that this worker lives.

Errors arrive as TreadleError. Knows nothing of what is in the files.
"""

from __future__ import annotations

import asyncio
import hashlib
from typing import Final

import google_crc32c
import grpc

from treadle.errors import from_rpc_error, make_error
from treadle.internal.v1 import blobs_pb2, blobs_pb2_grpc, journal_pb2, journal_pb2_grpc, workers_pb2, workers_pb2_grpc
from treadle.v1 import adapters_pb2
from treadle_service.channels import internal_metadata, open_channel

_CALL_SECONDS: Final = 10.0
_BLOB_SECONDS: Final = 300.0


class StoreClient:
    """Calls to one adapter store."""

    def __init__(self, address: str, token: str) -> None:
        self._channel, self._blob_channel = open_channel(address), open_channel(address)
        self._metadata = internal_metadata(token)
        self._journal = journal_pb2_grpc.JournalServiceStub(self._channel)
        self._workers = workers_pb2_grpc.WorkerServiceStub(self._channel)
        self._blobs = blobs_pb2_grpc.BlobServiceStub(self._blob_channel)

    async def close(self) -> None:
        """Closes the channels."""
        await self._channel.close()
        await self._blob_channel.close()

    async def lookup(self, name: str) -> adapters_pb2.Adapter:
        """Returns a revision; raises ADAPTER_NOT_FOUND, or UNAVAILABLE when the store is away."""
        request = journal_pb2.LookupAdapterRequest(name=name)
        try:
            answer = await self._journal.LookupAdapter(request, metadata=self._metadata, timeout=_CALL_SECONDS)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
        return answer.adapter

    async def fetch(self, file: adapters_pb2.AdapterFile) -> bytes:
        """Returns the content of a file; raises BLOB_NOT_FOUND or CHECKSUM_MISMATCH."""
        data = bytearray()
        request = blobs_pb2.GetBlobRequest(sha256=file.sha256)
        try:
            async for frame in self._blobs.GetBlob(request, metadata=self._metadata, timeout=_BLOB_SECONDS):
                piece = frame.chunk.data
                if frame.HasField("chunk") and google_crc32c.value(piece) != frame.chunk.crc32c:
                    raise make_error("CHECKSUM_MISMATCH", f"a chunk of {file.path} was damaged on its way")
                data += piece
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
        content = bytes(data)
        # Hashing tens of megabytes on the event loop would hold up every stream.
        found = await asyncio.to_thread(lambda: hashlib.sha256(content).hexdigest())
        if found != file.sha256:
            raise make_error("CHECKSUM_MISMATCH", f"{file.path} arrived with the sha256 {found}, not {file.sha256}")
        return content

    async def heartbeat(self, request: workers_pb2.HeartbeatRequest) -> None:
        """Says that this worker lives."""
        try:
            await self._workers.Heartbeat(request, metadata=self._metadata, timeout=_CALL_SECONDS)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error

    async def unregister(self, worker: str) -> None:
        """Says that this worker goes."""
        request = workers_pb2.UnregisterRequest(worker=worker)
        try:
            await self._workers.Unregister(request, metadata=self._metadata, timeout=_CALL_SECONDS)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
