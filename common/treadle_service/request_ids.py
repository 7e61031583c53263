"""The id under which all services log one call: made where it comes in, passed on with the calls made for it.

Knows nothing of gRPC and of what is logged.
"""

import re
import uuid
from contextvars import ContextVar
from typing import Final

import structlog

HEADER: Final = "x-treadle-request"
_USABLE: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")

_current: ContextVar[str] = ContextVar("treadle_request", default="")


def begin(given: str | bytes, method: str) -> None:
    """Makes `given`, or a new id where that is none, the id of this task's call; lines of its log show it."""
    usable = isinstance(given, str) and _USABLE.fullmatch(given)
    request_id = str(given) if usable else uuid.uuid4().hex
    _current.set(request_id)
    structlog.contextvars.bind_contextvars(request_id=request_id, method=method.rpartition(".")[2])


def current() -> str:
    """Returns the id of the call that runs in this task; empty outside of one."""
    return _current.get()
