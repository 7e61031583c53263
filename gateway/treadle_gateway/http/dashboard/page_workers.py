"""The timeline: one lane per worker, each pass coloured by those who shared it."""

import time

from nicegui import ui
from starlette.requests import Request

from treadle.v1 import admin_pb2, timeline_pb2
from treadle_gateway.http.dashboard import charts, layout, shared
from treadle_gateway.http.dashboard.charts import Window
from treadle_gateway.http.dashboard.door import Viewer

REFRESH_SECONDS = 1.0
WINDOWS = {10: "10 s", 30: "30 s", 60: "1 min", 180: "3 min"}
# Workers' spans arrive with the next poll; the right edge stays a little behind, so that it is whole.
_BEHIND_SECONDS = 0.7
_PIXELS = 1100


def register() -> None:
    """Makes the page known."""

    @ui.page("/workers", title="Treadle: workers", response_timeout=20)
    async def workers(request: Request) -> None:
        viewer = shared.viewer_of(request)
        with layout.page(request, viewer, "Workers"):
            page = _WorkersPage(viewer)
            page.build()
            await shared.live(viewer, REFRESH_SECONDS, page.refresh)


class _WorkersPage:
    """The page in one browser."""

    def __init__(self, viewer: Viewer) -> None:
        self._viewer = viewer
        self._colors: dict[str, str] = {}
        self._lanes: list[str] = []
        self._chart: ui.echart | None = None
        self._paused = False

    def build(self) -> None:
        """Makes the parts, empty."""
        with ui.element("div").classes("line"):
            ui.label("Workers").classes("title")
            ui.element("div").classes("spacer")
            self._pause = ui.button(icon="pause", on_click=self._toggle).props("flat round dense color=grey")
            self._pause.tooltip("Hold the picture")
            self._window = ui.toggle(WINDOWS, value=30).props("dense unelevated no-caps toggle-color=primary")
            ui.link("Export trace", "/trace.json").classes("plain").props("download").tooltip(
                "For ui.perfetto.dev or chrome://tracing"
            )
        with layout.card("Who is on the workers, and when nobody is"):
            self._place = ui.element("div").style("width:100%")
            self._nothing = ui.element("div").style("width:100%")
            with self._nothing:
                layout.empty("No workers.", "A trainer or sampler appears here as soon as it has registered.")
            hint = "A block is a pass (trainers) or decode steps (samplers), split among the tenants that shared it."
            if not self._viewer.is_admin:
                hint += " Other tenants are shown as one."
            ui.label(hint).classes("faint")
        self._cards = ui.element("div").classes("grid")
        self._figures: dict[str, ui.label] = {}

    def _toggle(self) -> None:
        self._paused = not self._paused
        self._pause.props(f"icon={'play_arrow' if self._paused else 'pause'}")

    async def refresh(self) -> None:
        """Draws the last seconds."""
        if self._paused:
            return
        seconds = float(self._window.value)
        answer = await shared.parts().reader.spans(self._viewer, seconds + 2 * _BEHIND_SECONDS)
        end = time.time() - _BEHIND_SECONDS
        window = Window(end - seconds, end)
        self._draw(list(answer.workers), window)
        self._show_cards(list(answer.workers), window)

    def _draw(self, workers: list[timeline_pb2.WorkerTimeline], window: Window) -> None:
        self._nothing.set_visibility(not workers)
        self._place.set_visibility(bool(workers))
        own = self._viewer.tenant
        colors = charts.tenant_colors(workers, own, self._colors)
        resolution = (window.end - window.begin) / _PIXELS
        options = charts.timeline_chart([charts.coarse(worker, resolution) for worker in workers], window, colors)
        names = [worker.worker for worker in workers]
        if self._chart is None or names != self._lanes:
            self._lanes = names
            self._place.clear()
            with self._place:
                height = charts.timeline_height(len(workers))
                self._chart = ui.echart(options).style(f"height:{height}px; width:100%")
            return
        self._chart.options.clear()
        self._chart.options.update(options)
        self._chart.update()

    def _show_cards(self, workers: list[timeline_pb2.WorkerTimeline], window: Window) -> None:
        if {f"{worker.worker} busy" for worker in workers} != {key for key in self._figures if key.endswith(" busy")}:
            self._make_cards(workers)
        for worker in workers:
            spans = [span for span in worker.spans if span.started.ToNanoseconds() / 1e9 >= window.begin]
            num_shared = sum(len({share.tenant for share in span.shares}) > 1 for span in spans)
            rate = sum(span.num_tokens for span in spans) / (window.end - window.begin)
            self._figures[f"{worker.worker} busy"].set_text(f"{100 * charts.busy_share(worker, window):.0f} %")
            self._figures[f"{worker.worker} rate"].set_text(layout.number(rate))
            self._figures[f"{worker.worker} shared"].set_text(f"{num_shared} of {len(spans)}")

    def _make_cards(self, workers: list[timeline_pb2.WorkerTimeline]) -> None:
        self._cards.clear()
        self._figures.clear()
        with self._cards:
            for worker in workers:
                is_sampler = worker.kind == admin_pb2.WORKER_KIND_SAMPLER
                with layout.card(worker.worker), ui.element("div").classes("facts"):
                    layout.fact("Kind", "sampler" if is_sampler else "trainer")
                    layout.fact("Base", worker.base)
                    self._figures[f"{worker.worker} busy"] = layout.fact("Busy", "")
                    self._figures[f"{worker.worker} rate"] = layout.fact("Tokens/s", "")
                    what = "Decoding with company" if is_sampler else "Shared passes"
                    self._figures[f"{worker.worker} shared"] = layout.fact(what, "")
