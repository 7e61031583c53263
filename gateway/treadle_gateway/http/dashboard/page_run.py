"""One run: curves that move while it trains, what it samples, what was saved of it."""

import json
from collections.abc import Sequence
from typing import Any

from nicegui import ui
from starlette.requests import Request

from treadle.errors import TreadleError
from treadle.names import parse_adapter
from treadle.v1 import adapters_pb2, metrics_pb2
from treadle_gateway.http.dashboard import charts, layout, shared
from treadle_gateway.http.dashboard.door import Viewer
from treadle_gateway.http.dashboard.page_runs import cost_text
from treadle_gateway.http.dashboard.page_start import resume_form
from treadle_gateway.http.dashboard.reading import RunView
from treadle_gateway.http.dashboard.series import Curve, chart_of, charts_in_order

REFRESH_SECONDS = 1.5
_SHOWN_SETS = 8
_SHOWN_SAVED = 40
_MAX_CHARTS = 24
_MAX_COMPARED = 8


def register() -> None:
    """Makes the page known."""

    @ui.page("/runs/{tenant}/{run}", title="Treadle: run", response_timeout=20)
    async def run_page(request: Request, tenant: str, run: str) -> None:
        viewer, name = shared.viewer_of(request), f"tenants/{tenant}/runs/{run}"
        with layout.page(request, viewer):
            try:
                view = await shared.parts().reader.run(viewer, name)
            except TreadleError as error:
                with layout.card():
                    layout.empty("There is no such run." if error.reason != "UNAVAILABLE" else error.message)
                return
            page = _RunPage(viewer, view)
            await page.build()
            await shared.live(viewer, REFRESH_SECONDS, page.refresh)


class _RunPage:
    """The page of one run in one browser."""

    def __init__(self, viewer: Viewer, view: RunView) -> None:
        self._viewer, self._view = viewer, view
        self._charts: dict[str, ui.echart] = {}
        self._shown: dict[str, dict[str, Curve]] = {}
        self._samples_shown: list[tuple[int, int]] = []
        self._saved_shown: list[str] = []
        self._compared: list[str] = []

    async def build(self) -> None:
        """Makes the parts, empty."""
        view = self._view
        with ui.element("div").classes("line"):
            ui.label(view.label).classes("title")
            self._status = ui.label()
            ui.element("div").classes("spacer")
            self._compare = await self._comparison()
        with layout.card(), ui.element("div").classes("facts"):
            layout.fact("Run", view.name).classes("mono")
            layout.fact("Base", view.run.base)
            layout.fact("Rank", str(view.run.lora.rank))
            self._step = layout.fact("Step", "")
            self._tokens = layout.fact("Tokens", "")
            self._cost = layout.fact("Cost", "")
            self._worker = layout.fact("Worker", "")
        self._resume = ui.element("div").style("width:100%")
        self._resume.set_visibility(False)
        self._grid = ui.element("div").classes("grid")
        self._quiet = ui.element("div").style("width:100%")
        with self._quiet, layout.card():
            layout.empty("No steps yet.", "Curves appear with the first optimizer step.")
        with ui.element("div").classes("grid"):
            with layout.card("Samples"):
                self._samples = ui.element("div").style("display:flex; flex-direction:column; gap:10px; width:100%")
            with layout.card("Checkpoints and published adapters"):
                self._saved = ui.element("div").style("width:100%")
        _settings(view)

    async def refresh(self) -> None:
        """Shows what there is now."""
        reader, viewer, name = shared.parts().reader, self._viewer, self._view.name
        view = await reader.run(viewer, name)
        self._show_facts(view)
        curves = {"": (await reader.series(viewer, name)).curves()}
        for other in self._compared:
            curves[other] = (await reader.series(viewer, other)).curves()
        self._show_curves(curves)
        self._show_samples(await reader.samples(viewer, name))
        self._show_saved(await reader.saved(viewer, name))

    async def _comparison(self) -> ui.select:
        views = await shared.parts().reader.runs(self._viewer)
        options = {view.name: view.label for view in views if view.name != self._view.name}
        select = ui.select(options, multiple=True, label="Compare with", on_change=self._choose)
        return select.props("dense outlined use-chips options-dense").style("min-width:240px; max-width:520px")

    async def _choose(self, event: Any) -> None:  # Any: NiceGUI's event.
        self._compared = list(event.value)[:_MAX_COMPARED]
        await self.refresh()

    def _show_facts(self, view: RunView) -> None:
        if view.status != self._view.status or not self._status.text:
            self._status.set_text(view.status)
            self._status.classes(replace=f"status {view.status}")
            self._offer_resume(view)
        self._view = view
        planned = f" / {view.planned_steps}" if view.planned_steps else ""
        self._step.set_text(f"{view.step}{planned}")
        self._tokens.set_text(layout.number(view.tokens))
        priced = shared.parts().gateway.settings.price_per_million_tokens > 0
        self._cost.set_text(cost_text(view.cost) if priced else "no price set")
        self._worker.set_text(view.run.worker or "none")

    def _offer_resume(self, view: RunView) -> None:
        self._resume.clear()
        is_own_recipe = view.metadata.get("recipe") == "sft" and view.tenant == self._viewer.tenant
        can_resume = is_own_recipe and view.status == "interrupted"
        self._resume.set_visibility(can_resume)
        if can_resume:
            with self._resume:
                resume_form(self._viewer, view)

    def _show_curves(self, runs: dict[str, dict[str, Curve]]) -> None:
        names = [name for curves in runs.values() for name in curves]
        shown = charts_in_order(names)[:_MAX_CHARTS]
        self._quiet.set_visibility(not shown)
        for chart in shown:
            self._show_chart(chart, self._curves_of(chart, runs))

    def _curves_of(self, chart: str, runs: dict[str, dict[str, Curve]]) -> dict[str, Curve]:
        labels = self._labels()
        found: dict[str, Curve] = {}
        for run, curves in runs.items():
            of_chart = {name: curve for name, curve in curves.items() if chart_of(name) == chart}
            for name, curve in of_chart.items():
                parts = [labels[run]] if len(runs) > 1 else []
                parts += [name] if len(of_chart) > 1 or not parts else []
                found[": ".join(parts)] = curve
        return found

    def _labels(self) -> dict[str, str]:
        """Returns what runs are called in legends; those of the same name by their ids."""
        options = dict(self._compare.options)
        named = {"": self._view.label, **{run: options.get(run, run) for run in self._compared}}
        labels = list(named.values())
        ids = {"": self._view.name, **{run: run for run in self._compared}}
        return {
            run: label if labels.count(label) == 1 else f"{label} ({ids[run].rpartition('/')[2]})"
            for run, label in named.items()
        }

    def _show_chart(self, chart: str, curves: dict[str, Curve]) -> None:
        if self._shown.get(chart) == curves:
            return
        self._shown[chart] = curves
        options = charts.line_chart(curves)
        if chart not in self._charts:
            with self._grid, layout.card(chart.capitalize() if chart.islower() else chart):
                self._charts[chart] = ui.echart(options).style("height:230px; width:100%")
                self._charts[chart].props(f'data-chart="{chart}"')
            return
        shown = self._charts[chart].options
        shown.clear()
        shown.update(options)
        self._charts[chart].update()

    def _show_samples(self, sets: Sequence[metrics_pb2.SampleSet]) -> None:
        newest = [(found.step, found.time.ToNanoseconds()) for found in sets[:_SHOWN_SETS]]
        if newest == self._samples_shown and self._samples.default_slot.children:
            return
        self._samples_shown = newest
        self._samples.clear()
        with self._samples:
            if not sets:
                layout.empty("No samples yet.", "A loop shows some with log_metrics(step, values, samples=[...]).")
            for found in sets[:_SHOWN_SETS]:
                for sample in found.samples:
                    _show_sample(found.step, sample)

    def _show_saved(self, saved: Sequence[adapters_pb2.Adapter]) -> None:
        names = [adapter.name for adapter in saved[:_SHOWN_SAVED]]
        if names == self._saved_shown and self._saved.default_slot.children:
            return
        self._saved_shown = names
        self._saved.clear()
        with self._saved:
            if not saved:
                layout.empty("Nothing saved yet.", "Checkpoints and published adapters are listed here.")
                return
            with ui.element("table").style("width:100%; border-spacing:0 4px; font-size:13.5px"):
                for adapter in saved[:_SHOWN_SAVED]:
                    _show_adapter(adapter)


def _show_sample(step: int, sample: metrics_pb2.TextSample) -> None:
    with ui.element("div").classes("sample"):
        worth = f", reward {sample.reward:.4g}" if sample.HasField("reward") else ""
        ui.label(f"step {step}{worth}").classes("k")
        for text in (sample.prompt, sample.response):
            if text:
                with ui.element("pre"):
                    ui.label(text)


def _show_adapter(adapter: adapters_pb2.Adapter) -> None:
    name = parse_adapter(adapter.name)
    size = sum(file.size for file in adapter.files)
    with ui.element("tr"):
        for text in (name.adapter, "checkpoint" if name.kind == "checkpoints" else "adapter", f"step {adapter.step}"):
            with ui.element("td"):
                ui.label(text)
        with ui.element("td").classes("faint"):
            ui.label(f"{layout.number(size)}B")
        with ui.element("td").style("text-align:right"):
            ui.link("Download", f"/download/{adapter.name}.zip").classes("plain").props("download")


def _settings(view: RunView) -> None:
    """Shows what the run was made from, if a recipe made it."""
    known = {name: text for name, text in view.metadata.items() if name in ("recipe", "config", "plan")}
    others = {name: text for name, text in view.metadata.items() if name not in known}
    if not view.metadata:
        return
    with layout.card(), ui.expansion("Settings").props("dense").style("width:100%"):
        parts: dict[str, Any] = {**others, **known}  # Any: JSON.
        for name in ("config", "plan"):
            try:
                parts[name] = json.loads(known.get(name, ""))
            except ValueError:
                continue
        text = json.dumps(parts, indent=2, ensure_ascii=False)
        with ui.element("pre").classes("mono").style("margin:0; white-space:pre-wrap; overflow-wrap:anywhere"):
            ui.label(text)
