"""Lets requests in: a key, a scope that the route names, a place among the open requests.

What a handler raises becomes its face's answer. Knows nothing of what the handlers do.
"""

from collections.abc import Callable

from starlette.requests import HTTPConnection, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from treadle.errors import TreadleError, make_error
from treadle_gateway.auth import bearer_key
from treadle_gateway.authenticator import Authenticator
from treadle_gateway.http.faces import PUBLIC, Endpoint, Scopes
from treadle_service import request_ids
from treadle_service.interceptors import RunningCall, answering
from treadle_service.logs import get_logger
from treadle_service.metrics import observing_call
from treadle_service.principal import Principal, set_principal

log = get_logger(__name__)


class Guard:
    """Guards one route or mount, as an ASGI application in front of it."""

    def __init__(
        self, app: ASGIApp, scopes: Scopes, on_error: Callable[[TreadleError], Response], authenticator: Authenticator
    ) -> None:
        self._app = app
        self._scopes = scopes
        self._on_error = on_error
        self._authenticator = authenticator

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request; an error after the first byte can only end the connection."""
        started = False
        failure: TreadleError | None = None
        callbacks: list[Callable[[], None]] = []

        async def watched(message: Message) -> None:
            nonlocal started
            started = started or message["type"] in ("http.response.start", "websocket.accept")
            await send(message)

        async def fail(error: TreadleError) -> None:
            nonlocal failure
            failure = error
            outcome.failed(error.code.name, error.reason)

        request_ids.begin("", scope["path"])
        try:
            # One name for all: paths hold ids, whose number has no bound.
            with observing_call("HTTP") as outcome:
                async with answering(RunningCall(callbacks.append), scope["path"], fail) as call:
                    if self._scopes != PUBLIC:
                        await self._admit(HTTPConnection(scope), call)
                    await self._app(scope, receive, watched)
        finally:
            for callback in callbacks:
                callback()
        if failure is not None:
            if started or scope["type"] != "http":
                raise ConnectionAbortedError(failure.message)
            await self._on_error(failure)(scope, receive, send)

    async def _admit(self, connection: HTTPConnection, call: RunningCall) -> None:
        with self._authenticator.live.admitting():
            principal = await self._authenticator.identify(key_of(connection))
            _check(principal, self._scopes, connection.url.path)
            set_principal(principal)
        self._authenticator.enter(call, principal, "request")


def key_of(connection: HTTPConnection) -> str:
    """Returns the key that a request carries as `X-API-Key` or `Authorization: Bearer`, empty without one."""
    return connection.headers.get("x-api-key", "") or bearer_key(connection.headers.get("authorization", ""))


def endpoint_app(endpoint: Endpoint) -> ASGIApp:
    """Returns a handler as an ASGI application; what it raises is left to the guard."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        response = await endpoint(Request(scope, receive, send))
        await response(scope, receive, send)

    return app


def _check(principal: Principal, scopes: Scopes, path: str) -> None:
    if principal.scopes.isdisjoint(scopes):
        need = " or ".join(map(repr, scopes))
        raise make_error("PERMISSION_DENIED", f"{path} needs a key with the scope {need}")
