"""A worker's calls to the adapter store that trainers and samplers share: adapters, blobs, signs of life.

Every call has a deadline; a store that is away for a moment is asked again. Errors arrive as TreadleError. Knows
nothing of what the bytes mean, and nothing of leases or journals.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final, TypeVar

import google_crc32c
import grpc

from treadle.errors import TreadleError, from_rpc_error, make_error
from treadle.internal.v1 import blobs_pb2, blobs_pb2_grpc, journal_pb2, journal_pb2_grpc, workers_pb2, workers_pb2_grpc
from treadle.v1 import adapters_pb2
from treadle_service.channels import internal_metadata, open_channel

CHUNK_BYTES: Final = 2**20
CALL_SECONDS: Final = 10.0
BLOB_SECONDS: Final = 300.0
_FIRST_PAUSE_SECONDS: Final = 0.1
_LONGEST_PAUSE_SECONDS: Final = 2.0
_AWAY: Final = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "DRAINING")

T = TypeVar("T")


class StoreClient:
    """Calls to one adapter store over two channels: one for short calls, one for blobs."""

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

    async def lookup_adapter(self, name: str, *, tries: int = 8) -> adapters_pb2.Adapter:
        """Returns a saved adapter; ADAPTER_NOT_FOUND, or UNAVAILABLE when the store stayed away over all tries."""
        request = journal_pb2.LookupAdapterRequest(name=name)
        response: journal_pb2.LookupAdapterResponse = await self._retried(
            lambda: self._unary(self._journal.LookupAdapter, request), tries
        )
        return response.adapter

    async def heartbeat(self, request: workers_pb2.HeartbeatRequest) -> None:
        """Says that this worker lives. Asks once."""
        await self._unary(self._workers.Heartbeat, request)

    async def unregister(self, worker: str) -> None:
        """Says that this worker goes."""
        await self._unary(self._workers.Unregister, workers_pb2.UnregisterRequest(worker=worker))

    async def put_blob(self, data: bytes) -> str:
        """Stores bytes and returns their sha256."""
        # Hashing tens of megabytes on the event loop would hold up every stream.
        sha256 = await asyncio.to_thread(lambda: hashlib.sha256(data).hexdigest())
        if await self._retried(lambda: self._has_blob(sha256)):
            return sha256

        async def frames() -> AsyncIterator[blobs_pb2.PutBlobRequest]:
            yield blobs_pb2.PutBlobRequest(header=blobs_pb2.BlobHeader(sha256=sha256, size=len(data)))
            for start in range(0, len(data), CHUNK_BYTES):
                piece = data[start : start + CHUNK_BYTES]
                yield blobs_pb2.PutBlobRequest(chunk=blobs_pb2.BlobChunk(crc32c=google_crc32c.value(piece), data=piece))

        async def put() -> blobs_pb2.PutBlobResponse:
            try:
                return await self._blobs.PutBlob(frames(), metadata=self._metadata, timeout=BLOB_SECONDS)
            except grpc.aio.AioRpcError as error:
                raise from_rpc_error(error) from error

        await self._retried(put)
        return sha256

    async def get_blob(self, sha256: str) -> bytes:
        """Returns the bytes of an address; BLOB_NOT_FOUND, CHECKSUM_MISMATCH."""
        data = await self._retried(lambda: self._read_blob(sha256))
        found = await asyncio.to_thread(lambda: hashlib.sha256(data).hexdigest())
        if found != sha256:
            raise make_error("CHECKSUM_MISMATCH", f"blob {sha256} arrived with the sha256 {found}")
        return data

    async def _has_blob(self, sha256: str) -> bool:
        request = blobs_pb2.StatBlobRequest(sha256=sha256)
        response: blobs_pb2.StatBlobResponse = await self._unary(self._blobs.StatBlob, request)
        return response.complete

    async def _read_blob(self, sha256: str) -> bytes:
        data = bytearray()
        try:
            request = blobs_pb2.GetBlobRequest(sha256=sha256)
            async for frame in self._blobs.GetBlob(request, metadata=self._metadata, timeout=BLOB_SECONDS):
                piece = frame.chunk.data
                if frame.HasField("chunk") and google_crc32c.value(piece) != frame.chunk.crc32c:
                    raise make_error("CHECKSUM_MISMATCH", f"a chunk of blob {sha256} was damaged on its way")
                data += piece
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
        return bytes(data)

    # The stubs' multicallables are generic in both messages; one caller serves them all.
    async def _unary(self, method: Callable[..., Any], request: Any) -> Any:
        try:
            return await method(request, metadata=self._metadata, timeout=CALL_SECONDS)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error

    async def _retried(self, call: Callable[[], Awaitable[T]], tries: int = 8) -> T:
        """Asks again while the store is away; all calls that come here may be repeated."""
        pause = _FIRST_PAUSE_SECONDS
        for _ in range(tries - 1):
            try:
                return await call()
            except TreadleError as error:
                if error.reason not in _AWAY:
                    raise
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
        return await call()
