"""What faces share about one request: a bounded JSON body, work that ends when the caller goes, server-sent events.

Knows nothing of any particular face.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from typing import Any, Final, TypeVar

import orjson
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from treadle.errors import TreadleError, make_error

T = TypeVar("T")
Json = dict[str, Any]
"""A JSON object; values of any type."""

_DONE: Final = b"data: [DONE]\n\n"


async def read_json(request: Request, most_bytes: int) -> object:
    """Returns the body as JSON; BAD_VALUE if it is none, OPERATION_TOO_LARGE if it is longer than `most_bytes`."""
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > most_bytes:
            raise make_error("OPERATION_TOO_LARGE", f"a request has at most {most_bytes} bytes")
    try:
        value: object = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        raise make_error("BAD_VALUE", f"the body is not JSON: {error}") from error
    return value


async def until_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Returns what the work returns; cancels it and raises CANCELLED when the caller hangs up first.

    The request's body must have been read.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise make_error("CANCELLED", "the caller has gone")
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, TreadleError):
                await task


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def event_stream(
    request: Request, events: AsyncGenerator[Json, None], describe: Callable[[TreadleError], Json]
) -> StreamingResponse:
    """Returns the answer that sends events as they come, then `[DONE]`; it ends them when the caller hangs up.

    Waits for the first event, so that a request that fails before it is answered with a status. A later failure is an
    event of its own, as `describe` has it, and the last.
    """

    async def first_of() -> Json:
        return await anext(events)

    try:
        first = await until_gone(request, first_of())
    except BaseException:
        await events.aclose()
        raise

    async def lines() -> AsyncIterator[bytes]:
        yield _line(first)
        try:
            async for event in events:
                yield _line(event)
        except TreadleError as error:
            yield _line(describe(error))
            return
        yield _DONE

    return _EventStream(events, lines())


class _EventStream(StreamingResponse):
    def __init__(self, events: AsyncGenerator[Json, None], lines: AsyncIterator[bytes]) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(lines, headers=headers, media_type="text/event-stream")
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events, and ends what makes them however sending ended."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()


def _line(event: Json) -> bytes:
    return b"data: " + orjson.dumps(event) + b"\n\n"
