"""DatasetService: translates calls to the completions that the calling tenant keeps."""

import json
import re
import secrets
from collections.abc import Mapping
from functools import partial
from typing import Final

from treadle.errors import make_error
from treadle.v1 import datasets_pb2, datasets_pb2_grpc
from treadle_service.principal import current_principal
from treadle_store import completions
from treadle_store.clock import Clock
from treadle_store.database import Database
from treadle_store.pages import PageRequest

MAX_CONTENT_BYTES: Final = 2**20
MAX_METADATA: Final = 16
MAX_KEY: Final = 64
MAX_VALUE: Final = 512
_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")


class DatasetService(datasets_pb2_grpc.DatasetServiceServicer):
    """Keeps and gives out completions."""

    def __init__(self, database: Database, clock: Clock, max_completion_bytes: int) -> None:
        self._database = database
        self._clock = clock
        self._max_completion_bytes = max_completion_bytes

    async def CreateCompletion(
        self, request: datasets_pb2.CreateCompletionRequest, context: object
    ) -> datasets_pb2.CreateCompletionResponse:
        """Keeps a completion, or tells whether it would."""
        tenant, wanted = current_principal().tenant, request.completion
        _check_metadata(wanted.metadata)
        now_us = self._clock()
        if not wanted.id:
            # By time, as the ids that the gateway chooses.
            wanted.id = f"chatcmpl-{now_us:016x}{secrets.token_hex(8)}"
        _check_id(wanted.id)
        _check_length(wanted)
        if request.validate_only:
            await self._database.read(
                partial(completions.check_room, tenant=tenant, most_bytes=self._max_completion_bytes)
            )
            return datasets_pb2.CreateCompletionResponse()
        _check_content(wanted)
        body = partial(
            completions.record,
            tenant=tenant,
            wanted=wanted,
            most_bytes=self._max_completion_bytes,
            now_us=now_us,
        )
        return datasets_pb2.CreateCompletionResponse(completion=await self._database.write(body))

    async def ListCompletions(
        self, request: datasets_pb2.ListCompletionsRequest, context: object
    ) -> datasets_pb2.ListCompletionsResponse:
        """Lists a page."""
        limit = PageRequest(request.page_size, "").limit
        page = completions.Page(request.after, limit, request.descending, request.brief)
        found, has_more = await self._scan(request.filter, page)
        return datasets_pb2.ListCompletionsResponse(completions=found, has_more=has_more)

    async def GetCompletion(
        self, request: datasets_pb2.GetCompletionRequest, context: object
    ) -> datasets_pb2.GetCompletionResponse:
        """Returns one."""
        body = partial(completions.fetch, tenant=current_principal().tenant, name=request.id)
        return datasets_pb2.GetCompletionResponse(completion=await self._database.read(body))

    async def UpdateCompletion(
        self, request: datasets_pb2.UpdateCompletionRequest, context: object
    ) -> datasets_pb2.UpdateCompletionResponse:
        """Replaces metadata."""
        _check_metadata(request.metadata)
        tenant, metadata = current_principal().tenant, dict(request.metadata)
        body = partial(completions.change_metadata, tenant=tenant, name=request.id, metadata=metadata)
        return datasets_pb2.UpdateCompletionResponse(completion=await self._database.write(body))

    async def DeleteCompletion(
        self, request: datasets_pb2.DeleteCompletionRequest, context: object
    ) -> datasets_pb2.DeleteCompletionResponse:
        """Deletes one."""
        body = partial(completions.remove, tenant=current_principal().tenant, name=request.id)
        await self._database.write(body)
        return datasets_pb2.DeleteCompletionResponse()

    async def DeleteCompletions(
        self, request: datasets_pb2.DeleteCompletionsRequest, context: object
    ) -> datasets_pb2.DeleteCompletionsResponse:
        """Deletes all that a filter names, some hundred per transaction."""
        body = partial(completions.remove_some, wanted=_filter(request.filter))
        num_deleted = 0
        while deleted := await self._database.write(body):
            num_deleted += deleted
        return datasets_pb2.DeleteCompletionsResponse(num_deleted=num_deleted)

    async def _scan(
        self, wanted: datasets_pb2.CompletionFilter, page: completions.Page
    ) -> tuple[list[datasets_pb2.StoredCompletion], bool]:
        return await self._database.read(partial(completions.scan, wanted=_filter(wanted), page=page))


def _filter(wanted: datasets_pb2.CompletionFilter) -> completions.Filter:
    if len(wanted.metadata) > MAX_METADATA:
        raise make_error("BAD_VALUE", f"a filter has at most {MAX_METADATA} entries")
    return completions.Filter(current_principal().tenant, wanted.model, dict(wanted.metadata))


def _check_id(name: str) -> None:
    if _ID.fullmatch(name) is None:
        raise make_error("BAD_VALUE", f"{name[:80]!r} is no id: letters, digits, '-' and '_', at most 64")


def _check_metadata(metadata: Mapping[str, str]) -> None:
    if len(metadata) > MAX_METADATA:
        raise make_error("BAD_VALUE", f"metadata has at most {MAX_METADATA} entries, not {len(metadata)}")
    for key, value in metadata.items():
        if not 0 < len(key) <= MAX_KEY or len(value) > MAX_VALUE or "\0" in key + value:
            raise make_error(
                "BAD_VALUE",
                f"the metadata {key[:80]!r} cannot be kept: keys have 1 to {MAX_KEY} characters, values at most "
                f"{MAX_VALUE}, and no zero byte",
            )


def _check_length(wanted: datasets_pb2.StoredCompletion) -> None:
    if len(wanted.messages_json.encode()) + len(wanted.response_json.encode()) > MAX_CONTENT_BYTES:
        raise make_error(
            "BAD_VALUE", f"messages and answer of a kept completion have at most {MAX_CONTENT_BYTES} bytes"
        )


def _check_content(wanted: datasets_pb2.StoredCompletion) -> None:
    """Raises BAD_VALUE unless the contents are JSON of the right kind, and the model has a name."""
    if not 0 < len(wanted.model) <= MAX_VALUE or "\0" in wanted.model:
        raise make_error("BAD_VALUE", f"model is the name of what answered, at most {MAX_VALUE} characters")
    for name, content, kind in (
        ("messages_json", wanted.messages_json, list),
        ("response_json", wanted.response_json, dict),
    ):
        try:
            fits = isinstance(json.loads(content), kind)
        except (ValueError, RecursionError):
            fits = False
        if not fits:
            raise make_error("BAD_VALUE", f"{name} is not a JSON {'array' if kind is list else 'object'}")
