"""The timeline of a deployment: what each worker did when, and for whom; also as a trace for Perfetto.

Knows nothing of how it is drawn.
"""

from collections.abc import Iterable
from typing import Any, Final

from treadle.channel import Transport
from treadle.records import Span, SpanShare, WorkerTimeline
from treadle.v1 import admin_pb2, timeline_pb2, timeline_pb2_grpc

OTHERS: Final = "other"
"""How the tenants are called that a key may not know."""


class TimelineCalls:
    """The call of a service client that shows what workers do; it waits for its answer."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._timeline = timeline_pb2_grpc.TimelineServiceStub(transport.ops_channel)

    def list_spans(self, after: float = 0.0) -> list[WorkerTimeline]:
        """Returns what workers did lately, or since a Unix time: passes and decode steps with those who shared them.

        Without the scope `admin` other tenants are one share without a name.
        """
        request = timeline_pb2.ListSpansRequest()
        # Unix times as floats are exact to a quarter of a microsecond; the span that one was taken from is no news.
        request.after.FromNanoseconds(int(after * 1e9) + 1000 if after else 0)
        answer: timeline_pb2.ListSpansResponse = self._transport.call(self._timeline.ListSpans, request)
        return timelines_from(answer)


def timelines_from(answer: timeline_pb2.ListSpansResponse) -> list[WorkerTimeline]:
    """Returns the values of an answer."""
    return [
        WorkerTimeline(
            found.worker,
            "sampler" if found.kind == admin_pb2.WORKER_KIND_SAMPLER else "trainer",
            found.base,
            tuple(_span_from(span) for span in found.spans),
        )
        for found in answer.workers
    ]


def chrome_trace(timelines: Iterable[WorkerTimeline]) -> dict[str, Any]:  # Any: JSON.
    """Returns timelines in the Trace Event Format, which chrome://tracing and ui.perfetto.dev open.

    A worker is a process. Its first track has each pass (or decode) once, named by who shared it; below it each tenant
    has a track of its own, so that everybody's gaps can be seen.
    """
    events: list[dict[str, Any]] = []
    for process, timeline in enumerate(timelines, 1):
        tracks = {"": 0}
        name = "pass" if timeline.kind == "trainer" else "decode"
        events.append(_named("process_name", process, 0, f"{timeline.worker} ({timeline.base})"))
        events.append(_named("thread_name", process, 0, f"every {name}"))
        for span in timeline.spans:
            sharers = {share.tenant or OTHERS for share in span.shares}
            events.append(_event(" + ".join(sorted(sharers)), name, process, 0, span, _details(span)))
            for share in span.shares:
                tenant = share.tenant or OTHERS
                if tenant not in tracks:
                    tracks[tenant] = len(tracks)
                    events.append(_named("thread_name", process, tracks[tenant], tenant))
                label = share.run.rpartition("/")[2] or tenant
                events.append(_event(label, name, process, tracks[tenant], span, _parts(share)))
    return {"displayTimeUnit": "ms", "traceEvents": events}


def _span_from(span: timeline_pb2.Span) -> Span:
    return Span(
        started=span.started.ToNanoseconds() / 1e9,
        took=span.took.ToNanoseconds() / 1e9,
        shares=tuple(
            SpanShare(share.tenant, share.run, share.num_tokens, share.num_sequences) for share in span.shares
        ),
        num_tokens=span.num_tokens,
        num_steps_beside=span.num_steps_beside,
        num_decode_steps=span.num_decode_steps,
    )


def _named(what: str, process: int, track: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": process, "tid": track, "args": {"name": name}}


def _event(name: str, category: str, process: int, track: int, span: Span, details: dict[str, Any]) -> dict[str, Any]:
    # Times are microseconds.
    return {
        "ph": "X",
        "name": name,
        "cat": category,
        "pid": process,
        "tid": track,
        "ts": round(span.started * 1e6, 3),
        "dur": round(span.took * 1e6, 3),
        "args": details,
    }


def _details(span: Span) -> dict[str, Any]:
    if span.num_decode_steps:
        return {"tokens": span.num_tokens, "decode_steps": span.num_decode_steps}
    return {"tokens": span.num_tokens, "runs": len(span.shares), "optimizer_steps_beside": span.num_steps_beside}


def _parts(share: SpanShare) -> dict[str, Any]:
    return {"sequences": share.num_sequences} if share.num_sequences else {"tokens": share.num_tokens}
