"""What a face is: routes with the scopes that they need, and the body of its errors.

Knows nothing of any particular face.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import grpc
import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from treadle.errors import TreadleError
from treadle_gateway.authenticator import Authenticator
from treadle_gateway.directory import Directory
from treadle_gateway.local_calls import LocalCalls
from treadle_gateway.settings import GatewaySettings

Endpoint = Callable[[Request], Awaitable[Response]]
Scopes = tuple[str, ...]

PUBLIC: Final[Scopes] = ()
"""For routes that are for everybody: probes, login pages, links that carry a signature of their own."""


@dataclass(frozen=True, slots=True)
class HttpGateway:
    """What a face is made from. Handlers run as the caller: `current_principal()` is theirs, and so are `calls`."""

    settings: GatewaySettings
    calls: LocalCalls
    directory: Directory
    authenticator: Authenticator
    # Where this gateway's gRPC side is, once it is served; https:// before it with TLS.
    address: Callable[[], str]


@dataclass(frozen=True, slots=True)
class HttpRoute:
    """One method of one path; any one of `scopes` is enough, PUBLIC needs no key. Nothing else is served."""

    method: str
    path: str
    endpoint: Endpoint
    scopes: Scopes


@dataclass(frozen=True, slots=True)
class HttpMount:
    """A whole ASGI application under a path; with PUBLIC it asks for keys itself."""

    path: str
    app: ASGIApp
    scopes: Scopes


_C = grpc.StatusCode
STATUS_OF_CODE: Final[Mapping[grpc.StatusCode, int]] = {
    _C.INVALID_ARGUMENT: 400,
    _C.OUT_OF_RANGE: 400,
    _C.FAILED_PRECONDITION: 400,
    _C.UNAUTHENTICATED: 401,
    _C.PERMISSION_DENIED: 403,
    _C.NOT_FOUND: 404,
    _C.ALREADY_EXISTS: 409,
    _C.ABORTED: 409,
    _C.CANCELLED: 409,
    _C.RESOURCE_EXHAUSTED: 429,
    _C.DEADLINE_EXCEEDED: 504,
    _C.UNAVAILABLE: 503,
    _C.UNIMPLEMENTED: 501,
    _C.INTERNAL: 500,
    _C.DATA_LOSS: 500,
}
"""A reason's HTTP status follows from its gRPC status. What waiting cannot mend is no 429: see `status_of`."""


def status_of(error: TreadleError) -> int:
    """Returns the HTTP status of an error: 429 and 503 only where the same request may succeed later."""
    status = STATUS_OF_CODE.get(error.code, 500)
    if status == 429 and not error.retryable:
        return 413 if error.reason in ("FRAME_TOO_LARGE", "OPERATION_TOO_LARGE") else 403
    return status


def error_response(error: TreadleError, status: int | None = None) -> Response:
    """Returns `{"detail": sentence, "reason": REASON}` with the error's status and, where it helps, Retry-After."""
    return json_response(
        {"detail": error.message, "reason": error.reason}, status or status_of(error), retry_headers(error)
    )


def retry_headers(error: TreadleError) -> dict[str, str]:
    """Returns the headers that say when to come again, if at all."""
    if error.retry_after_seconds is None:
        return {}
    seconds = max(0.0, error.retry_after_seconds)
    return {"retry-after": str(max(1, round(seconds))), "retry-after-ms": str(round(seconds * 1000))}


def json_response(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Returns a JSON answer."""
    return Response(orjson.dumps(value), status, dict(headers or {}), media_type="application/json")


@dataclass(frozen=True, slots=True)
class Face:
    """One API over HTTP."""

    name: str
    prefix: str
    routes: Sequence[HttpRoute]
    mounts: Sequence[HttpMount] = ()
    # Answers a request that failed, in the manner of this API.
    on_error: Callable[[TreadleError], Response] = error_response
    # Awaited when the gateway drains, before connections are closed: ends long polls and streams.
    on_drain: Callable[[], Awaitable[None]] | None = None
