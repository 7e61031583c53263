"""Traces of a user's own program: one span per operation, in the trace that the service keeps of it.

An operation is named by its run and seq everywhere, so its trace id and the id of its root span are hashes of the two:
nobody has to send them. Spans are made only where the program itself has set OpenTelemetry up; the SDK neither needs
nor imports it.
"""

import sys
import time
from typing import Any

import xxhash


def trace_id_of(run: str, seq: int) -> int:
    """Returns the trace id of an operation, 128 bits, never zero."""
    return int(xxhash.xxh3_128_intdigest(f"{run}/{seq}".encode())) or 1


def span_id_of(run: str, seq: int) -> int:
    """Returns the id of an operation's root span, 64 bits, never zero."""
    return int(xxhash.xxh3_64_intdigest(f"{run}/{seq}".encode())) or 1


# OpenTelemetry's types are not there where it is not installed.
def current_span_context() -> Any:
    """Returns the context of the program's own span, None where it traces nothing."""
    api = sys.modules.get("opentelemetry.trace")
    if api is None:
        return None
    context = api.get_current_span().get_span_context()
    return context if context.is_valid else None


def note_operation(run: str, seq: int, began: float, caller: Any, reason: str) -> None:
    """Notes an operation from its submission at `began` (Unix time) until now, linked to the span that made it."""
    api = sys.modules.get("opentelemetry.trace")
    if api is None:
        return
    parent = api.SpanContext(trace_id_of(run, seq), span_id_of(run, seq), is_remote=True, trace_flags=api.TraceFlags(1))
    span = api.get_tracer("treadle").start_span(
        "client",
        context=api.set_span_in_context(api.NonRecordingSpan(parent)),
        kind=api.SpanKind.CLIENT,
        start_time=int(began * 1e9),
        attributes={"run": run, "seq": seq, "reason": reason},
        links=[api.Link(caller)] if caller is not None else [],
    )
    span.end(int(time.time() * 1e9))
