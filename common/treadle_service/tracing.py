"""Traces that follow one operation through all services, without a byte on the wire.

An operation is named by its run and seq everywhere, so its trace id and the id of its root span are hashes of the two:
every service derives them for itself. Streams live for hours and journal writes are shared by many runs; neither could
carry a context of its own for each operation. Whether a trace is kept follows from its id too, so all services keep
the same ones. Other calls carry `traceparent` as usual.

Nothing of OpenTelemetry is imported unless `trace_endpoint` is set.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final

from treadle.spans import span_id_of, trace_id_of

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span, SpanContext, Tracer

HEADER: Final = "traceparent"
_LOW_64: Final = 2**64 - 1
Attributes = Mapping[str, "str | int | float"]

_root_ids: ContextVar[tuple[int, int] | None] = ContextVar("treadle_root_ids", default=None)


class Tracing:
    """Where spans go, if anywhere."""

    def __init__(self) -> None:
        self._tracer: Tracer | None = None
        self._provider: Any = None  # The SDK's provider, imported late.
        self._bound = 0

    @property
    def on(self) -> bool:
        """Whether any span is kept."""
        return self._tracer is not None

    def start(self, role: str, endpoint: str, ratio: float, exporter: SpanExporter | None = None) -> None:
        """Sends spans to an OTLP receiver at host:port, http:// or https:// before it; keeps `ratio` of all traces."""
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

        class DerivedIds(RandomIdGenerator):
            """Random ids, but for the root span of an operation."""

            def generate_span_id(self) -> int:
                ids = _root_ids.get()
                return ids[1] if ids is not None else super().generate_span_id()

            def generate_trace_id(self) -> int:
                ids = _root_ids.get()
                return ids[0] if ids is not None else super().generate_trace_id()

        if exporter is None:
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

            exporter = OTLPSpanExporter(endpoint=endpoint, insecure=not endpoint.startswith("https://"))
        self._bound = TraceIdRatioBased.get_bound_for_rate(ratio)
        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(ratio)),
            resource=Resource.create({"service.name": f"treadle-{role}", "service.namespace": "treadle"}),
            id_generator=DerivedIds(),
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("treadle")

    def stop(self) -> None:
        """Sends what is left."""
        if self._provider is not None:
            self._provider.shutdown()
        self._tracer = self._provider = None

    def keeps(self, run: str, seq: int) -> bool:
        """Tells whether the trace of an operation is kept."""
        return self._tracer is not None and trace_id_of(run, seq) & _LOW_64 < self._bound

    def root_span(self, name: str, run: str, seq: int, start: float, end: float, attributes: Attributes) -> None:
        """Notes the whole life of an operation; times in Unix seconds."""
        if self._tracer is None or not self.keeps(run, seq):
            return
        token = _root_ids.set((trace_id_of(run, seq), span_id_of(run, seq)))
        try:
            _note(self._tracer, name, None, start, end, {"run": run, "seq": seq, **attributes})
        finally:
            _root_ids.reset(token)

    def op_span(
        self, name: str, run: str, seq: int, start: float, end: float, attributes: Attributes | None = None
    ) -> None:
        """Notes a part of an operation's life; times in Unix seconds."""
        if self._tracer is None or not self.keeps(run, seq):
            return
        parent = _context_of(trace_id_of(run, seq), span_id_of(run, seq))
        _note(self._tracer, name, parent, start, end, {"run": run, "seq": seq, **(attributes or {})})

    @contextmanager
    def call_span(self, method: str, traceparent: str) -> Iterator[None]:
        """Has what happens inside be one span, the child of the caller's."""
        if self._tracer is None:
            yield
            return
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        parent = TraceContextTextMapPropagator().extract({HEADER: traceparent} if traceparent else {})
        with self._tracer.start_as_current_span(method.lstrip("/"), parent, SpanKind.SERVER):
            yield

    def header(self) -> str:
        """Returns `traceparent` of the call that runs in this task; empty without one."""
        context = self._current()
        if context is None:
            return ""
        return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"

    def log_id(self, run: object, seq: object) -> str:
        """Returns the trace id for a line of the log, empty without one."""
        if self._tracer is None:
            return ""
        if isinstance(run, str) and isinstance(seq, int):
            return f"{trace_id_of(run, seq):032x}"
        context = self._current()
        return "" if context is None else f"{context.trace_id:032x}"

    def _current(self) -> SpanContext | None:
        if self._tracer is None:
            return None
        from opentelemetry.trace import get_current_span

        context = get_current_span().get_span_context()
        return context if context.is_valid else None


TRACING: Final = Tracing()
"""The spans of this process."""


def unix_time(monotonic: float) -> float:
    """Returns the Unix time, in seconds, of a moment of the monotonic clock."""
    return time.time() - (time.monotonic() - monotonic)


def _context_of(trace_id: int, span_id: int) -> Any:  # OpenTelemetry's Context, imported late.
    from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context

    context = SpanContext(trace_id, span_id, is_remote=True, trace_flags=TraceFlags(TraceFlags.SAMPLED))
    return set_span_in_context(NonRecordingSpan(context))


def _note(tracer: Tracer, name: str, parent: Any, start: float, end: float, attributes: Attributes) -> None:
    from opentelemetry.context import Context

    span: Span = tracer.start_span(
        name, Context() if parent is None else parent, start_time=int(start * 1e9), attributes=dict(attributes)
    )
    span.end(int(max(start, end) * 1e9))
