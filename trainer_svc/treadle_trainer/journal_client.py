"""The trainer's calls to the journal: leases, operations and results, snapshots, saved adapters.

Adds to the calls that every worker makes. Knows nothing of what the bytes mean; the group commit of operations and
results is in journal_writer.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc
from google.protobuf.duration_pb2 import Duration

from treadle.channel import failure_of
from treadle.internal.v1 import journal_pb2, revisions_pb2
from treadle.v1 import adapters_pb2, training_pb2
from treadle_service.store_client import BLOB_SECONDS, StoreClient


class JournalClient(StoreClient):
    """Calls of a worker that holds leases."""

    async def claim(self, run: str, worker: str, address: str, ttl_seconds: float) -> journal_pb2.ClaimRunResponse:
        """Takes the lease of a run; RUN_NOT_FOUND, LEASE_HELD."""
        request = journal_pb2.ClaimRunRequest(run=run, holder=worker, address=address, ttl=_duration(ttl_seconds))
        return await self._retried(lambda: self._unary(self._journal.ClaimRun, request))

    async def renew(self, worker: str, ttl_seconds: float) -> dict[str, int]:
        """Extends all leases of this worker; returns the runs that it still holds, with their epochs. Asks once."""
        request = journal_pb2.RenewLeasesRequest(holder=worker, ttl=_duration(ttl_seconds))
        return dict((await self._unary(self._journal.RenewLeases, request)).held)

    async def release(self, run: str, epoch: int) -> None:
        """Gives a lease back. Asks once: an unreleased lease expires."""
        await self._unary(self._journal.ReleaseRun, journal_pb2.ReleaseRunRequest(run=run, epoch=epoch))

    async def write_journal(self, entries: list[journal_pb2.JournalEntry]) -> journal_pb2.WriteJournalResponse:
        """Writes operations and results of many runs in one transaction. Asks once."""
        request = journal_pb2.WriteJournalRequest(entries=entries)
        response: journal_pb2.WriteJournalResponse = await self._unary(self._journal.WriteJournal, request)
        return response

    async def read_result(self, run: str, seq: int) -> bytes:
        """Returns a stored result, empty while there is none; OPERATION_NOT_FOUND, RESULT_GONE."""
        request = journal_pb2.ReadResultRequest(run=run, seq=seq)
        response: journal_pb2.ReadResultResponse = await self._retried(
            lambda: self._unary(self._journal.ReadResult, request)
        )
        return response.result

    async def write_snapshot(self, run: str, epoch: int, snapshot: journal_pb2.Snapshot) -> None:
        """Records a snapshot whose blob is stored; STALE_LEASE."""
        request = journal_pb2.WriteSnapshotRequest(run=run, epoch=epoch, snapshot=snapshot)
        await self._retried(lambda: self._unary(self._journal.WriteSnapshot, request))

    async def mark_diverged(self, run: str, epoch: int, divergence: training_pb2.Divergence) -> None:
        """Marks a run as diverged; STALE_LEASE."""
        request = journal_pb2.MarkDivergedRequest(run=run, epoch=epoch, divergence=divergence)
        await self._retried(lambda: self._unary(self._journal.MarkDiverged, request))

    async def recover(self, run: str, epoch: int) -> AsyncIterator[journal_pb2.RecoverRunResponse]:
        """Streams the newest snapshot's row and the operations behind it."""
        request = journal_pb2.RecoverRunRequest(run=run, epoch=epoch)
        try:
            async for frame in self._journal.RecoverRun(request, metadata=self._metadata, timeout=BLOB_SECONDS):
                yield frame
        except grpc.aio.AioRpcError as error:
            raise failure_of(error)[0] from error

    async def announce_revision(self, base: str, revision: revisions_pb2.RevisionArriving) -> None:
        """Says that a revision is on its way. Asks once."""
        request = revisions_pb2.AnnounceRevisionRequest(base=base, revision=revision)
        await self._unary(self._revisions.AnnounceRevision, request)

    async def record_adapter(
        self, run: str, epoch: int, seq: int, adapter: adapters_pb2.Adapter, *, overwrite: bool = False
    ) -> None:
        """Records a saved adapter whose blobs are stored; STALE_LEASE, ADAPTER_EXISTS."""
        request = journal_pb2.RecordAdapterRequest(run=run, epoch=epoch, seq=seq, adapter=adapter, overwrite=overwrite)
        await self._retried(lambda: self._unary(self._journal.RecordAdapter, request))


def _duration(seconds: float) -> Duration:
    message = Duration()
    message.FromNanoseconds(int(seconds * 1e9))
    return message
