"""Structured logs: readable lines on a terminal, one JSON object per line in a container.

Values bound with structlog.contextvars (request_id, method) appear in every line of a task; where traces are kept, a
line about an operation or in a call has its trace_id. Never logs token ids, payloads or secrets: callers pass names and
numbers only.
"""

import logging
import sys
from typing import Literal

import structlog

from treadle_service.tracing import TRACING


def configure_logging(role: str, log_format: Literal["console", "json"], level: str) -> None:
    """Sends the logs of this process to standard error, each line with its `role`."""
    numeric = logging.getLevelNamesMapping()[level.upper()]
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if log_format == "json"
        # Plain tracebacks: the rich ones print local variables, and those hold keys and payloads.
        else structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
    )
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        _add_trace_id,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    if log_format == "json":
        shared.append(structlog.processors.format_exc_info)
    structlog.configure(
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(numeric),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(role=role)
    logging.basicConfig(level=max(numeric, logging.WARNING), stream=sys.stderr, format="%(name)s: %(message)s")


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """Returns the logger of a module."""
    logger: structlog.stdlib.BoundLogger = structlog.get_logger(module=name)
    return logger


def _add_trace_id(_logger: object, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    trace_id = TRACING.log_id(event.get("run"), event.get("seq"))
    if trace_id:
        event["trace_id"] = trace_id
    return event
