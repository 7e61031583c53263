"""Kept chat completions: what `store: true` keeps, and the calls by which OpenAI's clients list, read and delete it."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import orjson
from starlette.requests import Request
from starlette.responses import Response

from treadle.v1 import datasets_pb2
from treadle_gateway.http.exchange import Json, read_json
from treadle_gateway.http.faces import json_response
from treadle_gateway.http.openai.models import Models
from treadle_gateway.http.openai.problems import FieldError
from treadle_gateway.http.openai.requests import ChatRequest, read_metadata
from treadle_gateway.local_calls import LocalCalls

MAX_BODY_BYTES: Final = 2**16
_MOST: Final = 100
_DEFAULT: Final = 20
_METADATA: Final = re.compile(r"metadata\[(.+)\]")
# Fields of a request that are kept with its answer, as OpenAI shows them.
_KEPT_FIELDS: Final = ("temperature", "top_p", "presence_penalty", "frequency_penalty", "seed")


class Stored:
    """The calling tenant's kept completions."""

    def __init__(self, calls: LocalCalls, models: Models) -> None:
        self._calls = calls
        self._models = models

    async def check(self, fields: ChatRequest) -> None:
        """Raises what would keep an answer to this request from being kept, as far as that is known before it is."""
        request = datasets_pb2.CreateCompletionRequest(completion=_begun(fields), validate_only=True)
        await self._calls.datasets.CreateCompletion(request)

    async def keep(self, fields: ChatRequest, answer: Json) -> Json:
        """Keeps an answer with its conversation, and returns it with its metadata; raises what keeps it from that."""
        completion = _begun(fields)
        kept = answer | {name: getattr(fields, name) for name in _KEPT_FIELDS}
        completion.id, completion.model = answer["id"], answer["model"]
        completion.response_json = orjson.dumps(kept).decode()
        await self._calls.datasets.CreateCompletion(datasets_pb2.CreateCompletionRequest(completion=completion))
        return answer | {"metadata": dict(completion.metadata)}

    async def list(self, request: Request) -> Response:
        """GET /v1/chat/completions: a page, by time."""
        query = _Query(request)
        metadata = {match[1]: value for name, value in query.rest.items() if (match := _METADATA.fullmatch(name))}
        query.refuse_others(metadata)
        model = self._models.exact_name(query.model) if query.model else ""
        wanted = datasets_pb2.CompletionFilter(model=model, metadata=metadata)
        page = await self._calls.datasets.ListCompletions(
            datasets_pb2.ListCompletionsRequest(
                filter=wanted, after=query.after, page_size=query.limit, descending=query.descending
            )
        )
        return json_response(_page([_shown(completion) for completion in page.completions], page.has_more))

    async def retrieve(self, request: Request) -> Response:
        """GET /v1/chat/completions/{id}: one completion."""
        return json_response(_shown(await self._get(request)))

    async def update(self, request: Request) -> Response:
        """POST /v1/chat/completions/{id}: new metadata."""
        metadata = read_metadata(await read_json(request, MAX_BODY_BYTES))
        change = datasets_pb2.UpdateCompletionRequest(id=request.path_params["completion"], metadata=metadata)
        answer = await self._calls.datasets.UpdateCompletion(change)
        return json_response(_shown(answer.completion))

    async def delete(self, request: Request) -> Response:
        """DELETE /v1/chat/completions/{id}."""
        name = request.path_params["completion"]
        await self._calls.datasets.DeleteCompletion(datasets_pb2.DeleteCompletionRequest(id=name))
        return json_response({"object": "chat.completion.deleted", "id": name, "deleted": True})

    async def messages(self, request: Request) -> Response:
        """GET /v1/chat/completions/{id}/messages: the conversation up to the answer."""
        query = _Query(request)
        query.refuse_others(())
        completion = await self._get(request)
        entries = [
            message | {"id": f"{completion.id}-{number}", "name": None, "content_parts": None}
            for number, message in enumerate(orjson.loads(completion.messages_json))
        ]
        if query.descending:
            entries.reverse()
        if query.after:
            place = next((n for n, entry in enumerate(entries) if entry["id"] == query.after), None)
            if place is None:
                raise FieldError(f"`after` is no message of {completion.id}", "after", "invalid_value")
            entries = entries[place + 1 :]
        return json_response(_page(entries[: query.limit], len(entries) > query.limit))

    async def _get(self, request: Request) -> datasets_pb2.StoredCompletion:
        wanted = datasets_pb2.GetCompletionRequest(id=request.path_params["completion"])
        return (await self._calls.datasets.GetCompletion(wanted)).completion


class _Query:
    """The parameters of a listing; those that are not common to all are `rest`."""

    def __init__(self, request: Request) -> None:
        self.rest = dict(request.query_params)
        self.after = self.rest.pop("after", "")
        self.model = self.rest.pop("model", "")
        order = self.rest.pop("order", "asc")
        limit = self.rest.pop("limit", str(_DEFAULT))
        if order not in ("asc", "desc"):
            raise FieldError("`order` is asc or desc", "order", "invalid_value")
        if not (limit.isascii() and limit.isdecimal() and len(limit) <= 3 and 1 <= int(limit) <= _MOST):
            raise FieldError(f"`limit` is a number from 1 to {_MOST}", "limit", "invalid_value")
        self.descending, self.limit = order == "desc", int(limit)

    def refuse_others(self, metadata: Mapping[str, str] | Sequence[str]) -> None:
        """Raises FieldError for a parameter that nobody knows."""
        known = {f"metadata[{key}]" for key in metadata}
        for name in self.rest:
            if name not in known:
                raise FieldError(f"there is no parameter `{name[:100]}` here", name[:100], "unknown_parameter")


def _begun(fields: ChatRequest) -> datasets_pb2.StoredCompletion:
    """Returns what is kept of a request, without its answer: the conversation as the base's template read it."""
    messages = [message.for_template() for message in fields.messages]
    return datasets_pb2.StoredCompletion(metadata=fields.metadata or {}, messages_json=orjson.dumps(messages).decode())


def _page(entries: list[Any], has_more: bool) -> Json:  # Any: JSON objects of several kinds.
    return {
        "object": "list",
        "data": entries,
        "first_id": entries[0]["id"] if entries else None,
        "last_id": entries[-1]["id"] if entries else None,
        "has_more": has_more,
    }


def _shown(completion: datasets_pb2.StoredCompletion) -> Json:
    answer: Json = orjson.loads(completion.response_json)
    return answer | {"id": completion.id, "metadata": dict(completion.metadata)}
