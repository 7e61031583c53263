"""The form that starts a run from a file, and the one that lets an interrupted run go on.

The form's fields are those of the recipe's settings, so nothing that the command line can do is missing here.
"""

import json
from collections.abc import Callable
from dataclasses import Field, fields
from types import NoneType
from typing import Any, Final, Literal, get_args, get_origin, get_type_hints

from nicegui import events, ui
from nicegui.elements.mixins.value_element import ValueElement
from starlette.requests import Request

from treadle.errors import TreadleError
from treadle.recipes.configs import SftConfig
from treadle_gateway.http.dashboard import layout, shared
from treadle_gateway.http.dashboard.door import Viewer
from treadle_gateway.http.dashboard.jobs import NOT_OPTIONS, Job
from treadle_gateway.http.dashboard.reading import RunView

REFRESH_SECONDS = 1.0
FORMATS: Final = ".jsonl,.json,.csv,.tsv,.parquet"
_MAIN: Final = ("name", "learning_rate", "rank", "epochs", "batch_size", "eval_fraction")
_HIDDEN: Final = frozenset({"base", "resume", *NOT_OPTIONS})
Read = Callable[[], Any]
"""Returns what a field of the form says now."""


class Upload:
    """The file that was chosen in a browser; held until it is started with."""

    def __init__(self) -> None:
        self.name, self.content = "", b""

    def build(self, max_bytes: int) -> None:
        """Makes the place to drop a file."""
        self._box = ui.upload(
            label="Drop a file here, or choose one",
            auto_upload=True,
            max_file_size=max_bytes,
            max_files=1,
            on_upload=self._take,
            on_rejected=lambda: ui.notify(f"at most {max_bytes // 2**20} MB, and one of {FORMATS}", type="negative"),
        )
        self._box.props(f'accept="{FORMATS}" flat bordered').style("width:100%")

    async def _take(self, event: events.UploadEventArguments) -> None:
        self.name, self.content = event.file.name, await event.file.read()


def register() -> None:
    """Makes the page known."""

    @ui.page("/start", title="Treadle: start a run", response_timeout=20)
    async def start(request: Request) -> None:
        viewer = shared.viewer_of(request)
        with layout.page(request, viewer, "Start a run"):
            ui.label("Start a run").classes("title")
            with ui.element("div").classes("grid"):
                with layout.card("Supervised fine-tuning on your own rows"):
                    await _start_form(viewer)
                with layout.card("Jobs of this gateway"):
                    place = ui.element("div").style("display:flex; flex-direction:column; gap:10px; width:100%")
            shown: list[tuple[Any, ...]] = []

            async def refresh() -> None:
                nonlocal shown
                jobs = shared.parts().jobs.of(viewer)
                state = [(job.number, job.state, job.step, job.steps, len(job.notices)) for job in jobs]
                if state == shown and place.default_slot.children:
                    return
                shown = state
                place.clear()
                with place:
                    if not jobs:
                        layout.empty("No jobs yet.", "Each has a line here until this gateway ends.")
                    for job in jobs:
                        _show_job(job)

            await shared.live(viewer, REFRESH_SECONDS, refresh)


def resume_form(viewer: Viewer, view: RunView) -> None:
    """Makes the card that lets an interrupted run go on: its file again, and a button."""
    upload = Upload()
    config = json.loads(view.metadata.get("config", "{}"))
    file = str(config.get("data", "")).rpartition("/")[2]
    with layout.card("Interrupted"):
        ui.label(f"It goes on from its last checkpoint when you give the same file again ({file}).")
        upload.build(shared.parts().gateway.settings.max_upload_bytes)
        known = {each.name for each in fields(SftConfig)}
        options = {name: value for name, value in config.items() if name in known}
        options |= {"resume": view.name, "name": view.metadata.get("name", "")}

        async def resume() -> None:
            await _begin(viewer, upload, options)

        ui.button("Resume", on_click=resume).props("unelevated no-caps color=primary").style("align-self:flex-start")


async def _start_form(viewer: Viewer) -> None:
    upload = Upload()
    upload.build(shared.parts().gateway.settings.max_upload_bytes)
    ui.label("Rows with prompt and response, messages, or text: JSON lines, CSV, Parquet.").classes("faint")
    bases = [base.name for base in await shared.parts().reader.bases(viewer)]
    base = ui.select(bases, value=bases[0] if bases else None, label="Base").props("outlined dense")
    base.style("width:100%")
    described = {each.name: each for each in fields(SftConfig) if each.name not in _HIDDEN}
    reads: dict[str, Read] = {}
    columns = "display:grid; grid-template-columns:repeat(auto-fit,minmax(180px,1fr)); gap:12px; width:100%"
    with ui.element("div").style(columns):
        for name in _MAIN:
            reads[name] = _field(described[name])
    with (
        ui.expansion("More settings").props("dense").style("width:100%"),
        ui.element("div").style(columns + "; padding:6px 0"),
    ):
        for name, each in described.items():
            if name not in _MAIN:
                reads[name] = _field(each)

    async def start() -> None:
        options = {name: read() for name, read in reads.items()}
        await _begin(viewer, upload, {**options, "base": base.value or ""})

    ui.button("Start", on_click=start).props("unelevated no-caps color=primary").style("align-self:flex-start")


async def _begin(viewer: Viewer, upload: Upload, options: dict[str, Any]) -> None:
    if not upload.content:
        ui.notify("Choose a file first.", type="warning")
        return
    try:
        await shared.parts().door.identify(viewer.secret)
        await shared.parts().jobs.start(viewer, upload.name, upload.content, options)
    except TreadleError as error:
        ui.notify(error.message, type="negative")
        return
    ui.navigate.to("/start")


def _field(described: "Field[Any]") -> Read:
    """Makes the control of a setting and returns what reads it; an empty one leaves the choice to the recipe."""
    default: Any = described.default
    hint, label = get_type_hints(SftConfig)[described.name], described.name.replace("_", " ").capitalize()
    kinds = [kind for kind in get_args(hint) if kind is not NoneType] if NoneType in get_args(hint) else [hint]
    control: ValueElement[Any]
    if hint is bool:
        control = ui.switch(label, value=default)
    elif get_origin(hint) is Literal:
        control = ui.select(list(get_args(hint)), value=default, label=label).props("outlined dense")
    elif kinds[0] in (int, float):
        control = ui.number(label, value=default).props("outlined dense step=any")
    else:
        control = ui.input(label, value=default).props("outlined dense")
    control.tooltip(described.metadata["help"])
    control.props(f'data-setting="{described.name}"')

    def read() -> Any:
        value = control.value
        if value is None or value == "":
            return default
        return kinds[0](value) if kinds[0] in (int, float) else value

    return read


def _show_job(job: Job) -> None:
    with ui.element("div").classes("sample"):
        with ui.element("div").classes("line"):
            ui.label(job.state).classes(f"status {job.state}")
            if job.run:
                _, tenant, _, name = job.run.split("/")
                ui.link(name, f"/runs/{tenant}/{name}").classes("plain mono")
            ui.label(f"{job.file} on {job.base}").classes("faint")
            ui.element("div").classes("spacer")
            if job.is_live:

                async def stop() -> None:
                    await shared.parts().jobs.stop(job)

                ui.button("Stop", on_click=stop).props("flat dense no-caps color=grey")
        if job.steps:
            ui.linear_progress(job.step / job.steps, show_value=False).props("rounded size=6px")
            ui.label(f"step {job.step} of {job.steps}").classes("k")
        for text in (*job.notices[-2:], job.error):
            if text:
                ui.label(text).classes("faint")
