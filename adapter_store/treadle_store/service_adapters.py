"""AdapterService: lists, reads, writes and deletes the saved adapters of the calling tenant."""

from collections.abc import AsyncIterator
from functools import partial

from sqlalchemy import Connection

from treadle.errors import make_error
from treadle.names import ANY_TENANT, AdapterKind, AdapterName, RunName, parse_adapter, parse_run
from treadle.v1 import adapters_pb2, adapters_pb2_grpc
from treadle_service.principal import current_principal
from treadle_store import adapters, catalog, quotas
from treadle_store.access import read_adapter, visible_adapter, visible_run
from treadle_store.blob_io import hearing_out, read_chunks
from treadle_store.blobs import BlobStore
from treadle_store.clock import Clock
from treadle_store.database import Database
from treadle_store.pages import PageRequest
from treadle_store.revision_feed import RevisionFeed
from treadle_store.upload import Upload


class AdapterService(adapters_pb2_grpc.AdapterServiceServicer):
    """Lists, reads, writes and deletes saved adapters."""

    def __init__(
        self, database: Database, blobs: BlobStore, clock: Clock, max_adapter_bytes: int, feed: RevisionFeed
    ) -> None:
        self._feed = feed
        self._database = database
        self._blobs = blobs
        self._clock = clock
        self._max_adapter_bytes = max_adapter_bytes

    async def ListRevisions(
        self, request: adapters_pb2.ListRevisionsRequest, context: object
    ) -> adapters_pb2.ListRevisionsResponse:
        """Lists revisions, newest first."""
        found, token = await self._scan("revisions", request.run, PageRequest(request.page_size, request.page_token))
        return adapters_pb2.ListRevisionsResponse(revisions=found, next_page_token=token)

    async def GetRevision(
        self, request: adapters_pb2.GetRevisionRequest, context: object
    ) -> adapters_pb2.GetRevisionResponse:
        """Returns one revision."""
        return adapters_pb2.GetRevisionResponse(revision=await self._fetch(request.name, "revisions"))

    async def DeleteRevision(
        self, request: adapters_pb2.DeleteRevisionRequest, context: object
    ) -> adapters_pb2.DeleteRevisionResponse:
        """Deletes one revision."""
        await self._delete(_named(request.name, "revisions"))
        return adapters_pb2.DeleteRevisionResponse()

    async def ListCheckpoints(
        self, request: adapters_pb2.ListCheckpointsRequest, context: object
    ) -> adapters_pb2.ListCheckpointsResponse:
        """Lists checkpoints, newest first."""
        found, token = await self._scan("checkpoints", request.run, PageRequest(request.page_size, request.page_token))
        return adapters_pb2.ListCheckpointsResponse(checkpoints=found, next_page_token=token)

    async def GetCheckpoint(
        self, request: adapters_pb2.GetCheckpointRequest, context: object
    ) -> adapters_pb2.GetCheckpointResponse:
        """Returns one checkpoint."""
        return adapters_pb2.GetCheckpointResponse(checkpoint=await self._fetch(request.name, "checkpoints"))

    async def DeleteCheckpoint(
        self, request: adapters_pb2.DeleteCheckpointRequest, context: object
    ) -> adapters_pb2.DeleteCheckpointResponse:
        """Deletes one checkpoint."""
        await self._delete(_named(request.name, "checkpoints"))
        return adapters_pb2.DeleteCheckpointResponse()

    async def SetAdapterTtl(
        self, request: adapters_pb2.SetAdapterTtlRequest, context: object
    ) -> adapters_pb2.SetAdapterTtlResponse:
        """Sets when an adapter goes by itself."""
        expires_us = self._after(request)
        body = partial(adapters.expire_adapter, name=visible_adapter(request.name), expires_us=expires_us)
        return adapters_pb2.SetAdapterTtlResponse(adapter=await self._database.write(body))

    async def SetAdapterPublic(
        self, request: adapters_pb2.SetAdapterPublicRequest, context: object
    ) -> adapters_pb2.SetAdapterPublicResponse:
        """Lets every tenant read an adapter, or only its owner again."""
        body = partial(adapters.set_public, name=visible_adapter(request.name), public=request.public)
        return adapters_pb2.SetAdapterPublicResponse(adapter=await self._database.write(body))

    async def CopyAdapter(
        self, request: adapters_pb2.CopyAdapterRequest, context: object
    ) -> adapters_pb2.CopyAdapterResponse:
        """Saves an adapter once more under another run."""
        source = parse_adapter(request.source)
        target = visible_run(request.run).adapter(source.kind, request.adapter_id or source.adapter)
        body = partial(
            adapters.copy_adapter,
            source=source,
            target=target,
            expires_us=self._after(request),
            now_us=self._clock(),
        )
        copy = await self._database.write(body)
        self._feed.published(copy)
        return adapters_pb2.CopyAdapterResponse(adapter=copy)

    async def PullAdapter(
        self, request: adapters_pb2.PullAdapterRequest, context: object
    ) -> AsyncIterator[adapters_pb2.PullAdapterResponse]:
        """Streams an adapter's files."""
        adapter = await self._fetch(request.name)
        yield adapters_pb2.PullAdapterResponse(adapter=adapter)
        wanted = [file for file in adapter.files if request.path in ("", file.path)]
        if not wanted:
            raise make_error("BLOB_NOT_FOUND", f"{request.name} has no file {request.path[:100]!r}")
        for file in wanted:
            yield adapters_pb2.PullAdapterResponse(file=file)
            async for data, crc32c in read_chunks(self._blobs, file.sha256, request.offset if request.path else 0):
                yield adapters_pb2.PullAdapterResponse(chunk=adapters_pb2.FileChunk(data=data, crc32c=crc32c))

    async def PushAdapter(
        self, request_iterator: AsyncIterator[adapters_pb2.PushAdapterRequest], context: object
    ) -> adapters_pb2.PushAdapterResponse:
        """Stores the files of a PEFT adapter as a revision of a run."""
        async with hearing_out(request_iterator):
            first = await anext(request_iterator, None)
            if first is None or first.WhichOneof("frame") != "header":
                raise make_error("BAD_FRAME", "PushAdapter begins with a header that names the run and the revision")
            run_name = visible_run(first.header.run)
            name = run_name.adapter("revisions", first.header.revision_id)
            row = await self._database.read(partial(_room_for_upload, name=run_name))
            run = catalog.to_run(row, self._clock())
            upload = Upload(self._blobs, self._max_adapter_bytes)
            await upload.receive(request_iterator)
            await upload.check(run)
        adapter = adapters_pb2.Adapter(base=run.base, lora=run.lora, files=upload.files)

        def record(connection: Connection) -> adapters_pb2.Adapter:
            catalog.fetch_run(connection, run_name)
            return adapters.record_adapter(connection, name, adapter, 0, self._clock())

        revision = await self._database.write(record)
        self._feed.published(revision)
        return adapters_pb2.PushAdapterResponse(revision=revision)

    def _after(self, request: adapters_pb2.SetAdapterTtlRequest | adapters_pb2.CopyAdapterRequest) -> int | None:
        """Returns when a request's ttl is over, None without one; raises BAD_VALUE."""
        if not request.HasField("ttl"):
            return None
        if request.ttl.ToNanoseconds() <= 0:
            raise make_error("BAD_VALUE", "ttl is a time from now on; leave it unset to keep the adapter for ever")
        return self._clock() + request.ttl.ToNanoseconds() // 1000

    async def _scan(self, kind: AdapterKind, run: str, page: PageRequest) -> tuple[list[adapters_pb2.Adapter], str]:
        tenant = current_principal().tenant
        # Another tenant's run and one that never saved anything list the same: nothing. A run may be gone already.
        body = partial(adapters.scan_adapters, tenant=tenant, kind=kind, run=parse_run(run) if run else None, page=page)
        return await self._database.read(body)

    async def _fetch(self, name: str, kind: AdapterKind | None = None) -> adapters_pb2.Adapter:
        if name.startswith(ANY_TENANT):
            own = parse_adapter(f"tenants/{current_principal().tenant}/{name.removeprefix(ANY_TENANT)}")
            return await self._database.read(partial(adapters.find_adapter, own=_of_kind(own, kind)))
        return await self._database.read(read_adapter(_of_kind(parse_adapter(name), kind)))

    async def _delete(self, name: AdapterName) -> None:
        base = await self._database.write(partial(adapters.delete_adapter, name=name, now_us=self._clock()))
        self._feed.removed(base, str(name))


def _room_for_upload(connection: Connection, name: RunName) -> catalog.RunRow:
    """Returns the run's row; an upload that would be refused at its end is refused before it begins."""
    row = catalog.fetch_run(connection, name)
    quotas.check_storage(connection, name.tenant, quotas.storage_limit(connection, name.tenant, lock=False))
    return row


def _named(name: str, kind: AdapterKind) -> AdapterName:
    return _of_kind(visible_adapter(name), kind)


def _of_kind(adapter: AdapterName, kind: AdapterKind | None) -> AdapterName:
    if kind is not None and adapter.kind != kind:
        raise make_error("BAD_NAME", f"{adapter} is not one of the run's {kind}")
    return adapter
