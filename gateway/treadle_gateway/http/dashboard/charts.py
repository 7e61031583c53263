"""ECharts options of curves and of the timeline. Colours read on light and dark ground alike.

Pure: from values to dictionaries.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from treadle.v1 import admin_pb2, timeline_pb2
from treadle_gateway.http.dashboard.series import Curve

Options = dict[str, Any]  # Any: JSON.

# Distinguishable without red against green (Okabe and Ito's, brightened for dark ground).
COLORS: Final = ("#3b82f6", "#e69f00", "#10b981", "#d55e00", "#a78bfa", "#56b4e9", "#f0c808", "#e377c2", "#8c6d31")
OTHER_COLOR: Final = "#8a93a3"
OTHER: Final = "other"
_TEXT: Final = "#8a93a3"
_LINE: Final = "rgba(128,138,155,0.22)"
_TOOLTIP: Final = {
    "backgroundColor": "rgba(24,28,37,0.94)",
    "borderWidth": 0,
    "textStyle": {"color": "#f3f4f6", "fontSize": 12},
}
_LANE_PIXELS: Final = 64

# Draws one share of a span: lane, start, end (ms), and which part of the lane's height is its own.
_DRAW_SHARE: Final = """(params, api) => {
  const from = api.coord([api.value(1), api.value(0)]), to = api.coord([api.value(2), api.value(0)]);
  const height = api.size([0, 1])[1] * 0.72, top = from[1] - height / 2 + height * api.value(3);
  const shape = echartsClip({x: from[0], y: top, width: Math.max(to[0] - from[0], 1), height: height * api.value(4)},
                            params.coordSys);
  return shape && {type: 'rect', shape, style: {fill: api.visual('color')}};
}""".replace(
    "echartsClip",
    "((r, c) => { const x = Math.max(r.x, c.x), end = Math.min(r.x + r.width, c.x + c.width);"
    " return end > x ? {x, y: r.y, width: end - x, height: r.height} : null; })",
)
_SPAN_TOOLTIP: Final = "(p) => p.marker + '<b>' + p.seriesName + '</b><br>' + p.value[5]"


def line_chart(curves: Mapping[str, Curve]) -> Options:
    """Returns a chart of curves over steps, by the names of their legend."""
    return {
        "animation": False,
        "color": list(COLORS),
        "grid": {"left": 8, "right": 16, "top": 34 if len(curves) > 1 else 14, "bottom": 6, "containLabel": True},
        "legend": {
            "show": len(curves) > 1,
            "type": "scroll",
            "top": 0,
            "left": 0,
            "itemWidth": 14,
            "itemHeight": 8,
            "textStyle": {"color": _TEXT},
            "pageTextStyle": {"color": _TEXT},
        },
        "tooltip": {"trigger": "axis", "confine": True, **_TOOLTIP},
        "xAxis": {
            "type": "value",
            "min": "dataMin",
            "max": "dataMax",
            "minInterval": 1,
            "axisLabel": {"color": _TEXT, "hideOverlap": True},
            "axisLine": {"onZero": False, "lineStyle": {"color": _LINE}},
            "axisTick": {"show": False},
            "splitLine": {"show": False},
        },
        "yAxis": {
            "type": "value",
            "scale": True,
            "axisLabel": {"color": _TEXT},
            "axisLine": {"show": False},
            "axisTick": {"show": False},
            "splitLine": {"lineStyle": {"color": _LINE}},
        },
        "series": [_line(name, curve) for name, curve in curves.items()],
    }


def _line(name: str, curve: Curve) -> Options:
    return {
        "type": "line",
        "name": name,
        "data": [[step, float(f"{value:.6g}")] for step, value in curve],
        "showSymbol": len(curve) < 3,
        "symbolSize": 5,
        "lineStyle": {"width": 1.8},
        "emphasis": {"disabled": True},
    }


@dataclass(frozen=True, slots=True)
class Window:
    """The part of time that a timeline shows: Unix times in seconds."""

    begin: float
    end: float


def timeline_chart(
    workers: Sequence[timeline_pb2.WorkerTimeline], window: Window, colors: Mapping[str, str]
) -> Options:
    """Returns one lane per worker: each pass a block, split among those who shared it, coloured by tenant."""
    data: dict[str, list[list[Any]]] = {tenant: [] for tenant in colors}
    for lane, worker in enumerate(workers):
        for span in worker.spans:
            for tenant, row in _blocks(worker.kind, lane, span):
                if tenant in data:
                    data[tenant].append(row)
    return {
        "animation": False,
        "grid": {"left": 8, "right": 16, "top": 36, "bottom": 6, "containLabel": True},
        "legend": {
            "type": "scroll",
            "top": 0,
            "left": 0,
            "itemWidth": 14,
            "itemHeight": 10,
            "textStyle": {"color": _TEXT},
            "pageTextStyle": {"color": _TEXT},
        },
        "tooltip": {"confine": True, ":formatter": _SPAN_TOOLTIP, **_TOOLTIP},
        "xAxis": {
            "type": "time",
            "min": round(window.begin * 1000),
            "max": round(window.end * 1000),
            "axisLabel": {"color": _TEXT, "hideOverlap": True},
            "axisLine": {"lineStyle": {"color": _LINE}},
            "splitLine": {"show": True, "lineStyle": {"color": _LINE}},
        },
        "yAxis": {
            "type": "category",
            "inverse": True,
            "data": [worker.worker for worker in workers],
            "axisLabel": {"color": _TEXT},
            "axisLine": {"lineStyle": {"color": _LINE}},
            "axisTick": {"show": False},
        },
        "series": [
            {
                "type": "custom",
                "name": tenant,
                ":renderItem": _DRAW_SHARE,
                "encode": {"x": [1, 2], "y": 0},
                "itemStyle": {"color": color},
                "data": data[tenant],
            }
            for tenant, color in colors.items()
        ],
    }


def timeline_height(num_workers: int) -> int:
    """Returns the height of the chart in pixels."""
    return 80 + _LANE_PIXELS * max(1, num_workers)


def tenant_colors(workers: Sequence[timeline_pb2.WorkerTimeline], own: str, known: dict[str, str]) -> dict[str, str]:
    """Returns a colour for each tenant that is seen, the own one's first; who has one in `known` keeps it."""
    seen = {share.tenant or OTHER for worker in workers for span in worker.spans for share in span.shares}
    for tenant in sorted(seen, key=lambda tenant: (tenant != own, tenant)):
        if tenant == OTHER:
            known.setdefault(OTHER, OTHER_COLOR)
        else:
            known.setdefault(tenant, COLORS[sum(name != OTHER for name in known) % len(COLORS)])
    return {tenant: color for tenant, color in known.items() if tenant in seen}


def busy_share(worker: timeline_pb2.WorkerTimeline, window: Window) -> float:
    """Returns which part of a window a worker was busy; spans of one worker do not overlap."""
    busy = 0.0
    for span in worker.spans:
        started = span.started.ToNanoseconds() / 1e9
        ended = started + span.took.ToNanoseconds() / 1e9
        busy += max(0.0, min(ended, window.end) - max(started, window.begin))
    return min(1.0, busy / max(window.end - window.begin, 1e-9))


def coarse(worker: timeline_pb2.WorkerTimeline, seconds: float) -> timeline_pb2.WorkerTimeline:
    """Returns a lane in which spans of the same company, with gaps too short to be seen between them, are one."""
    found = timeline_pb2.WorkerTimeline(worker=worker.worker, kind=worker.kind, base=worker.base)
    for span in worker.spans:
        last = found.spans[-1] if found.spans else None
        if last is None or _gap(last, span) > seconds or _company(last) != _company(span):
            found.spans.append(span)
            continue
        ended = span.started.ToNanoseconds() + span.took.ToNanoseconds()
        last.took.FromNanoseconds(ended - last.started.ToNanoseconds())
        last.num_tokens += span.num_tokens
        last.num_decode_steps += span.num_decode_steps
        for mine, theirs in zip(_by_run(last), _by_run(span), strict=True):
            mine.num_tokens += theirs.num_tokens
            mine.num_sequences = max(mine.num_sequences, theirs.num_sequences)
    return found


def _blocks(kind: int, lane: int, span: timeline_pb2.Span) -> list[tuple[str, list[Any]]]:
    started = span.started.ToNanoseconds() / 1e6
    took = span.took.ToNanoseconds() / 1e6
    weights = [float(share.num_tokens or share.num_sequences) or 1.0 for share in span.shares]
    blocks, offset = [], 0.0
    for share, weight in zip(span.shares, weights, strict=True):
        part = weight / sum(weights)
        times = [round(started, 2), round(started + took, 2)]
        row = [lane, *times, round(offset, 4), round(part, 4), _explained(kind, span, share)]
        blocks.append((share.tenant or OTHER, row))
        offset += part
    return blocks


def _explained(kind: int, span: timeline_pb2.Span, share: timeline_pb2.SpanShare) -> str:
    took = f"{span.took.ToNanoseconds() / 1e6:.0f} ms"
    if kind == admin_pb2.WORKER_KIND_SAMPLER:
        return f"{share.num_sequences} sequences, {span.num_decode_steps} decode steps, {took}"
    run = share.run.rpartition("/")[2]
    return f"{run + ': ' if run else ''}{share.num_tokens} of {span.num_tokens} tokens, {took}"


def _gap(last: timeline_pb2.Span, span: timeline_pb2.Span) -> float:
    ended = last.started.ToNanoseconds() + last.took.ToNanoseconds()
    return (span.started.ToNanoseconds() - ended) / 1e9


def _company(span: timeline_pb2.Span) -> list[tuple[str, str]]:
    return sorted((share.tenant, share.run) for share in span.shares)


def _by_run(span: timeline_pb2.Span) -> list[timeline_pb2.SpanShare]:
    return sorted(span.shares, key=lambda share: (share.tenant, share.run))
