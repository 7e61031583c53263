"""JournalService: translates calls to bodies of the catalog and the journal and runs them in the database.

Each call that names a run is for that run's tenant or for a service that acts for itself.
"""

import time
from collections.abc import AsyncIterator
from functools import partial
from typing import Final

from google.protobuf.duration_pb2 import Duration
from sqlalchemy import Connection

from treadle.errors import TreadleError, UnavailableError, make_error, to_operation_error
from treadle.internal.v1 import journal_pb2, journal_pb2_grpc, usage_pb2
from treadle.names import check_tenant, parse_adapter
from treadle.v1 import adapters_pb2, types_pb2
from treadle_service import failpoints
from treadle_service.tracing import TRACING
from treadle_store import adapters, catalog, journal
from treadle_store.access import may_see, read_adapter, visible_adapter, visible_run
from treadle_store.blob_io import require_blob
from treadle_store.blobs import BlobStore
from treadle_store.clock import Clock
from treadle_store.database import Batched, Database
from treadle_store.journal_entries import RunEntry, write_entries
from treadle_store.pages import PageRequest
from treadle_store.revision_feed import RevisionFeed
from treadle_store.unnamed import UnnamedRevisions

DEFAULT_TTL_US: Final = 10_000_000
MAX_TTL_US: Final = 3_600_000_000
_EntryBody = Batched[RunEntry, usage_pb2.Budget | None]
# Pages of a recovery hold at most this many payloads of 1 MiB in memory.
RECOVERY_PAGE: Final = 8


class JournalService(journal_pb2_grpc.JournalServiceServicer):
    """Keeps runs, leases, the operation journal and snapshots."""

    def __init__(
        self, database: Database, blobs: BlobStore, clock: Clock, feed: RevisionFeed, unnamed: UnnamedRevisions
    ) -> None:
        self._database = database
        self._blobs = blobs
        self._clock = clock
        self._feed = feed
        self._unnamed = unnamed

    async def RegisterRun(
        self, request: journal_pb2.RegisterRunRequest, context: object
    ) -> journal_pb2.RegisterRunResponse:
        """Adds a run to the catalog."""
        _require_tenant(request.tenant)
        body = partial(catalog.register_run, tenant=request.tenant, request=request.run, now_us=self._clock())
        with failpoints.around("store.register_run"):
            run, replayed = await self._database.write(body)
        return journal_pb2.RegisterRunResponse(run=run, replayed=replayed)

    async def LookupRun(self, request: journal_pb2.LookupRunRequest, context: object) -> journal_pb2.LookupRunResponse:
        """Returns a run with its lease."""
        name, now_us = visible_run(request.run), self._clock()
        row = await self._database.read(partial(catalog.fetch_run, name=name))
        return journal_pb2.LookupRunResponse(run=catalog.to_run(row, now_us), lease=journal.to_lease(row, now_us))

    async def ScanRuns(self, request: journal_pb2.ScanRunsRequest, context: object) -> journal_pb2.ScanRunsResponse:
        """Lists a tenant's runs."""
        _require_tenant(request.tenant)
        page = PageRequest(request.page_size, request.page_token)
        body = partial(catalog.scan_runs, tenant=request.tenant, page=page, now_us=self._clock())
        runs, token = await self._database.read(body)
        return journal_pb2.ScanRunsResponse(runs=runs, next_page_token=token)

    async def RemoveRun(self, request: journal_pb2.RemoveRunRequest, context: object) -> journal_pb2.RemoveRunResponse:
        """Removes a run."""
        await self._database.write(partial(catalog.remove_run, name=visible_run(request.run)))
        return journal_pb2.RemoveRunResponse()

    async def ClaimRun(self, request: journal_pb2.ClaimRunRequest, context: object) -> journal_pb2.ClaimRunResponse:
        """Takes the lease of a run."""
        _require_holder(request.holder)
        claim = journal.Claim(visible_run(request.run), request.holder, request.address, _ttl_us(request.ttl))
        # The time is read when the writer gets to it: a claim must not expire a lease that was renewed before it.
        with failpoints.around("store.claim_run"):
            return await self._database.write(lambda connection: journal.claim_run(connection, claim, self._clock()))

    async def RenewLeases(
        self, request: journal_pb2.RenewLeasesRequest, context: object
    ) -> journal_pb2.RenewLeasesResponse:
        """Extends all leases of a holder."""
        _require_holder(request.holder)
        holder, ttl_us = request.holder, _ttl_us(request.ttl)
        with failpoints.around("store.renew_leases"):
            held = await self._database.write(
                lambda connection: journal.renew_leases(connection, holder, ttl_us, self._clock())
            )
        return journal_pb2.RenewLeasesResponse(held=held)

    async def ReleaseRun(
        self, request: journal_pb2.ReleaseRunRequest, context: object
    ) -> journal_pb2.ReleaseRunResponse:
        """Gives a lease back."""
        with failpoints.around("store.release_run"):
            await self._database.write(partial(journal.release_run, name=visible_run(request.run), epoch=request.epoch))
        return journal_pb2.ReleaseRunResponse()

    async def WriteJournal(
        self, request: journal_pb2.WriteJournalRequest, context: object
    ) -> journal_pb2.WriteJournalResponse:
        """Writes operations and results in one transaction; each entry is answered alone."""
        prepared, began = [await self._prepare(entry) for entry in request.entries], time.time()
        bodies = [body for body in prepared if not isinstance(body, TreadleError)]
        with failpoints.around("store.write_journal"):
            written = iter(await self._database.write_all(bodies) if bodies else ())
        outcomes = [body if isinstance(body, TreadleError) else next(written) for body in prepared]
        if TRACING.on:
            _trace(request, began)
        errors = [
            to_operation_error(outcome) if isinstance(outcome, TreadleError) else types_pb2.OperationError()
            for outcome in outcomes
        ]
        # Of a tenant with several runs the last counts: the entries were written in this order.
        budgets = {outcome.tenant: outcome for outcome in outcomes if isinstance(outcome, usage_pb2.Budget)}
        return journal_pb2.WriteJournalResponse(errors=errors, budgets=budgets.values())

    async def ReadResult(
        self, request: journal_pb2.ReadResultRequest, context: object
    ) -> journal_pb2.ReadResultResponse:
        """Returns the stored result of an operation."""
        body = partial(journal.read_result, name=visible_run(request.run), seq=request.seq)
        return journal_pb2.ReadResultResponse(result=await self._database.read(body))

    async def WriteSnapshot(
        self, request: journal_pb2.WriteSnapshotRequest, context: object
    ) -> journal_pb2.WriteSnapshotResponse:
        """Records a snapshot."""
        name, snapshot = visible_run(request.run), request.snapshot
        await require_blob(self._blobs, snapshot.sha256, snapshot.size)
        body = partial(journal.write_snapshot, name=name, epoch=request.epoch, snapshot=snapshot)
        with failpoints.around("store.write_snapshot"):
            await self._database.write(body)
        return journal_pb2.WriteSnapshotResponse()

    async def MarkDiverged(
        self, request: journal_pb2.MarkDivergedRequest, context: object
    ) -> journal_pb2.MarkDivergedResponse:
        """Marks a run as diverged."""
        name, epoch, found = visible_run(request.run), request.epoch, request.divergence
        await self._database.write(
            lambda connection: journal.mark_diverged(connection, name, epoch, found, self._clock())
        )
        return journal_pb2.MarkDivergedResponse()

    async def RecoverRun(
        self, request: journal_pb2.RecoverRunRequest, context: object
    ) -> AsyncIterator[journal_pb2.RecoverRunResponse]:
        """Streams the newest snapshot and all operations behind it."""
        name, epoch, seq = visible_run(request.run), request.epoch, 0
        header = await self._database.read(partial(journal.recovery_header, name=name, epoch=epoch))
        yield journal_pb2.RecoverRunResponse(header=header)
        while True:
            body = partial(journal.recovery_page, name=name, epoch=epoch, after_seq=seq, limit=RECOVERY_PAGE)
            page = await self._database.read(body)
            if not page:
                return
            for operation in page:
                yield journal_pb2.RecoverRunResponse(operation=operation)
            seq = page[-1].seq

    async def RecordAdapter(
        self, request: journal_pb2.RecordAdapterRequest, context: object
    ) -> journal_pb2.RecordAdapterResponse:
        """Records a revision or checkpoint."""
        run, name = visible_run(request.run), visible_adapter(request.adapter.name)
        if name.run_name != run:
            raise make_error("BAD_NAME", f"{name} is not under the run {run} that it is saved from")
        if not request.adapter.files:
            raise make_error("BAD_VALUE", f"{name} has no files")
        for file in request.adapter.files:
            await require_blob(self._blobs, file.sha256, file.size)

        def record(connection: Connection) -> adapters_pb2.Adapter:
            if request.epoch:
                journal.check_epoch(connection, run, request.epoch)
            else:
                catalog.fetch_run(connection, run)
            return adapters.record_adapter(
                connection, name, request.adapter, request.seq, self._clock(), overwrite=request.overwrite
            )

        with failpoints.around("store.record_adapter"):
            recorded = await self._database.write(record)
        self._feed.published(recorded)
        return journal_pb2.RecordAdapterResponse()

    async def LookupAdapter(
        self, request: journal_pb2.LookupAdapterRequest, context: object
    ) -> journal_pb2.LookupAdapterResponse:
        """Returns a saved adapter."""
        adapter = await self._database.read(read_adapter(parse_adapter(request.name), for_worker=True))
        if adapter.unnamed:
            self._unnamed.note_use(adapter.name)
        return journal_pb2.LookupAdapterResponse(adapter=adapter)

    async def _prepare(self, entry: journal_pb2.JournalEntry) -> _EntryBody | TreadleError:
        """Returns the body of an entry, or what is wrong with it beforehand."""
        try:
            name = visible_run(entry.run)
            for append in entry.appends:
                if append.payload_sha256:
                    await require_blob(self._blobs, append.payload_sha256)
        except UnavailableError:
            # The blob may well be there: the whole write is tried again, no run is told that its entry is wrong.
            raise
        except TreadleError as error:
            return error
        return Batched(write_entries, RunEntry(name, entry, self._clock()))


def _require_tenant(tenant: str) -> None:
    check_tenant(tenant)
    if not may_see(tenant):
        raise make_error("PERMISSION_DENIED", f"this call may not act for the tenant {tenant!r}")


def _require_holder(holder: str) -> None:
    if not 1 <= len(holder) <= 128:
        raise make_error("BAD_NAME", "holder must be a worker id of 1 to 128 characters")


def _ttl_us(ttl: Duration) -> int:
    length_us = ttl.ToMicroseconds() or DEFAULT_TTL_US
    if not 0 < length_us <= MAX_TTL_US:
        raise make_error("BAD_VALUE", "ttl must be above 0 and at most an hour")
    return length_us


def _trace(request: journal_pb2.WriteJournalRequest, began: float) -> None:
    """Notes in the traces of all operations of a write that it took part of their time."""
    now, num_runs = time.time(), len(request.entries)
    for entry in request.entries:
        for name, rows in (("append", entry.appends), ("commit", entry.commits)):
            for row in rows:
                TRACING.op_span(name, entry.run, row.seq, began, now, {"num_runs": num_runs})
