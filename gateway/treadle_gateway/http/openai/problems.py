"""Errors in OpenAI's shape, with the statuses from which its clients choose their exception and whether to try again.

Knows the catalogue of Treadle's errors, nothing of what was asked.
"""

from collections.abc import Mapping
from typing import Any, Final

import orjson
from starlette.responses import Response

from treadle.errors import BadInputError, TreadleError
from treadle_gateway.http.faces import retry_headers, status_of

_STATUS: Final[Mapping[str, int]] = {
    # Its clients' words for a clash with what is there.
    "REQUEST_ID_REUSED": 409,
    "ADAPTER_EXISTS": 409,
    # More than there is: OpenAI says so with 429 too, and its clients are told not to try again.
    "QUOTA_EXCEEDED": 429,
}
_CODES: Final[Mapping[str, str]] = {
    "UNAUTHENTICATED": "invalid_api_key",
    "MODEL_NOT_FOUND": "model_not_found",
    "CONTEXT_OVERFLOW": "context_length_exceeded",
    "RATE_LIMITED": "rate_limit_exceeded",
    "QUEUE_FULL": "rate_limit_exceeded",
    "QUOTA_EXCEEDED": "insufficient_quota",
}
_TYPES: Final[Mapping[int, str]] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    429: "rate_limit_error",
}
_OF_MODEL: Final = frozenset({"MODEL_NOT_FOUND", "ADAPTER_NOT_FOUND", "RUN_NOT_FOUND", "UNKNOWN_BASE", "BAD_NAME"})


class FieldError(BadInputError):
    """A field of a request that cannot be; `param` is its place, `api_code` OpenAI's word for what is wrong."""

    def __init__(self, message: str, param: str | None = None, api_code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.api_code = api_code


def body_of(error: TreadleError) -> dict[str, Any]:
    """Returns the JSON of an error."""
    status = _status(error)
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    code: str | None = _CODES.get(error.reason, error.reason.lower())
    param = "model" if error.reason in _OF_MODEL else None
    if isinstance(error, FieldError):
        code, param = error.api_code, error.param
    return {"error": {"message": error.message, "type": kind, "param": param, "code": code}}


def respond(error: TreadleError) -> Response:
    """Returns the answer to a request that failed; it says whether trying again may help."""
    headers = {"x-should-retry": "true" if error.retryable else "false"} | retry_headers(error)
    return Response(orjson.dumps(body_of(error)), _status(error), headers, media_type="application/json")


def _status(error: TreadleError) -> int:
    return _STATUS.get(error.reason) or status_of(error)
