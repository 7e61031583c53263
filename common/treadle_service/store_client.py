"""A worker's calls to the adapter store that trainers and samplers share: adapters, blobs, signs of life.

Every call has a deadline; a store that is away for a moment is asked again. Errors arrive as TreadleError. Knows
nothing of what the bytes mean, and nothing of leases or journals.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import google_crc32c
import grpc

from treadle.channel import failure_of
from treadle.errors import TreadleError, make_error
from treadle.internal.v1 import (
    blobs_pb2,
    blobs_pb2_grpc,
    journal_pb2,
    journal_pb2_grpc,
    revisions_pb2,
    revisions_pb2_grpc,
    usage_pb2,
    usage_pb2_grpc,
    workers_pb2,
    workers_pb2_grpc,
)
from treadle.v1 import adapters_pb2, admin_pb2
from treadle_service import blob_delta
from treadle_service.channels import internal_metadata, open_channel
from treadle_service.incoming_files import IncomingFiles
from treadle_service.logs import get_logger
from treadle_service.tls import ClientTls

CHUNK_BYTES: Final = 2**20
CALL_SECONDS: Final = 10.0
BLOB_SECONDS: Final = 300.0
_FIRST_PAUSE_SECONDS: Final = 0.1
_LONGEST_PAUSE_SECONDS: Final = 2.0
AWAY: Final = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "DRAINING")
"""Reasons with which a store is away for a moment."""

T = TypeVar("T")
log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class KnownBlob:
    """A blob that the caller has."""

    sha256: str
    content: bytes


class StoreClient:
    """Calls to one adapter store over two channels: one for short calls, one for blobs."""

    def __init__(
        self, address: str, token: str, shared_blobs: Path | None = None, tls: ClientTls | None = None
    ) -> None:
        """`shared_blobs` is the store's blob folder, if this process reaches it."""
        self._shared_blobs = shared_blobs
        self.incoming = IncomingFiles(shared_blobs)
        self.num_received_bytes = 0
        """Bytes of blobs that came over the wire."""
        self._channel, self._blob_channel = open_channel(address, tls), open_channel(address, tls)
        self._metadata = internal_metadata(token)
        self._journal = journal_pb2_grpc.JournalServiceStub(self._channel)
        self._workers = workers_pb2_grpc.WorkerServiceStub(self._channel)
        self._revisions = revisions_pb2_grpc.RevisionServiceStub(self._channel)
        self._usage = usage_pb2_grpc.UsageServiceStub(self._channel)
        self._blobs = blobs_pb2_grpc.BlobServiceStub(self._blob_channel)

    async def close(self) -> None:
        """Closes the channels, and removes what was prepared."""
        self.incoming.close()
        await self._channel.close()
        await self._blob_channel.close()

    async def lookup_adapter(self, name: str, *, tries: int = 8) -> adapters_pb2.Adapter:
        """Returns a saved adapter; ADAPTER_NOT_FOUND, or UNAVAILABLE when the store stayed away over all tries."""
        request = journal_pb2.LookupAdapterRequest(name=name)
        response: journal_pb2.LookupAdapterResponse = await self._retried(
            lambda: self._unary(self._journal.LookupAdapter, request), tries
        )
        return response.adapter

    async def watch_revisions(
        self, request: revisions_pb2.WatchRevisionsRequest
    ) -> AsyncGenerator[revisions_pb2.WatchRevisionsResponse, None]:
        """Yields news of revisions until the stream ends or breaks; raises what it broke with. Asks once."""
        call = self._revisions.WatchRevisions(request, metadata=self._metadata)
        try:
            async for event in call:
                yield event
        except grpc.aio.AioRpcError as error:
            raise failure_of(error)[0] from error
        finally:
            call.cancel()

    async def heartbeat(self, request: workers_pb2.HeartbeatRequest) -> None:
        """Says that this worker lives. Asks once."""
        await self._unary(self._workers.Heartbeat, request)

    async def scan_workers(self, kind: admin_pb2.WorkerKind, base: str) -> Sequence[workers_pb2.WorkerEntry]:
        """Returns the live workers of a kind that hold a base. Asks once."""
        request = workers_pb2.ScanWorkersRequest(kind=kind, base=base)
        response: workers_pb2.ScanWorkersResponse = await self._unary(self._workers.ScanWorkers, request)
        return response.workers

    async def unregister(self, worker: str) -> None:
        """Says that this worker goes."""
        await self._unary(self._workers.Unregister, workers_pb2.UnregisterRequest(worker=worker))

    async def get_budgets(self, tenants: Sequence[str]) -> Sequence[usage_pb2.Budget]:
        """Returns what tenants may use now. Asks once."""
        request = usage_pb2.GetBudgetsRequest(tenants=tenants)
        response: usage_pb2.GetBudgetsResponse = await self._unary(self._usage.GetBudgets, request)
        return response.budgets

    async def report_usage(self, request: usage_pb2.ReportUsageRequest) -> Sequence[usage_pb2.Budget]:
        """Records use; returns what its tenants may use now. Asks once; the same report again does no harm."""
        response: usage_pb2.ReportUsageResponse = await self._unary(self._usage.ReportUsage, request)
        return response.budgets

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
                raise failure_of(error)[0] from error

        await self._retried(put)
        return sha256

    async def get_blob(self, sha256: str, base: KnownBlob | None = None) -> bytes:
        """Returns the bytes of an address, sent as differences to `base` if there is one and the store has it.

        Raises BLOB_NOT_FOUND, CHECKSUM_MISMATCH.
        """
        data = await self._retried(lambda: self._read_blob(sha256, base))
        found = await asyncio.to_thread(lambda: hashlib.sha256(data).hexdigest())
        if found != sha256:
            raise make_error("CHECKSUM_MISMATCH", f"blob {sha256} arrived with the sha256 {found}")
        return data

    def new_file(self, *, spare: bool = False) -> Path | None:
        """Returns where to write a new file for `put_file`; None when the store's blob folder is not shared.

        With `spare` a file may be there, from `incoming.prepare`; it is to be overwritten.
        """
        return self.incoming.new(spare=spare)

    async def put_file(self, path: Path, wanted: Callable[[], bool] = lambda: False) -> str:
        """Gives the store a file that lies at a `new_file`, and returns its sha256; the file is gone afterwards.

        Goes on as long as `wanted()` while the store is away.
        """
        with path.open("rb") as file:
            request = blobs_pb2.AdoptBlobRequest(file=path.name, size=path.stat().st_size)
            try:
                answer: blobs_pb2.AdoptBlobResponse = await persist(
                    lambda: self._retried(lambda: self._unary(self._blobs.AdoptBlob, request)), wanted
                )
                # A store that sees another folder, or was started again before it answered, has no such file; what was
                # written is still here.
                if answer.sha256:
                    return answer.sha256
                data = await asyncio.to_thread(file.read)
                return await persist(lambda: self.put_blob(data), wanted)
            finally:
                path.unlink(missing_ok=True)

    async def get_file(self, sha256: str, base: KnownBlob | None = None, *, verify: bool = True) -> bytes | Path:
        """Returns where a blob lies, in a shared folder, else its bytes as `get_blob` does.

        Without `verify` the content of a file is left to the caller to check.
        """
        path = self.blob_file(sha256)
        if path is not None and (await asyncio.to_thread(_holds, path, sha256) if verify else path.is_file()):
            return path
        return await self.get_blob(sha256, base)

    def blob_file(self, sha256: str) -> Path | None:
        """Returns where a blob lies, if it does, in a shared folder; None when none is shared."""
        return None if self._shared_blobs is None else self._shared_blobs / sha256[:2] / sha256[2:]

    async def _has_blob(self, sha256: str) -> bool:
        request = blobs_pb2.StatBlobRequest(sha256=sha256)
        response: blobs_pb2.StatBlobResponse = await self._unary(self._blobs.StatBlob, request)
        return response.complete

    async def _read_blob(self, sha256: str, base: KnownBlob | None) -> bytes:
        data, differs = bytearray(), False
        try:
            request = blobs_pb2.GetBlobRequest(sha256=sha256, base_sha256=base.sha256 if base else "")
            async for frame in self._blobs.GetBlob(request, metadata=self._metadata, timeout=BLOB_SECONDS):
                if not frame.HasField("chunk"):
                    differs = bool(frame.header.base_sha256)
                    continue
                piece = frame.chunk.data
                self.num_received_bytes += len(piece)
                if google_crc32c.value(piece) != frame.chunk.crc32c:
                    raise make_error("CHECKSUM_MISMATCH", f"a chunk of blob {sha256} was damaged on its way")
                if differs and base is not None:
                    known = base.content[len(data) : len(data) + CHUNK_BYTES]
                    piece = await asyncio.to_thread(blob_delta.decode, known, piece)
                data += piece
        except ValueError as error:
            raise make_error("CHECKSUM_MISMATCH", f"a difference of blob {sha256} does not fit: {error}") from error
        except grpc.aio.AioRpcError as error:
            raise failure_of(error)[0] from error
        return bytes(data)

    # The stubs' multicallables are generic in both messages; one caller serves them all.
    async def _unary(self, method: Callable[..., Any], request: Any) -> Any:
        try:
            return await method(request, metadata=self._metadata, timeout=CALL_SECONDS)
        except grpc.aio.AioRpcError as error:
            raise failure_of(error)[0] from error

    async def _retried(self, call: Callable[[], Awaitable[T]], tries: int = 8) -> T:
        """Asks again while the store is away; all calls that come here may be repeated."""
        pause = _FIRST_PAUSE_SECONDS
        for _ in range(tries - 1):
            try:
                return await call()
            except TreadleError as error:
                if error.reason not in AWAY:
                    raise
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
        return await call()


async def persist(call: Callable[[], Awaitable[T]], wanted: Callable[[], bool]) -> T:
    """Makes a call that may be repeated again and again for as long as the store is away and `wanted()`."""
    while True:
        try:
            return await call()
        except TreadleError as error:
            if error.reason not in AWAY or not wanted():
                raise
            log.warning("store_away", reason=error.reason, message=error.message)
        # A refusal may come at once.
        await asyncio.sleep(_FIRST_PAUSE_SECONDS)


def _holds(path: Path, sha256: str) -> bool:
    """Tells whether a file is there and is what its address says."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == sha256
    except OSError:
        return False
