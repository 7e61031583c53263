"""The list of runs."""

import time
from typing import Any

from nicegui import ui
from starlette.requests import Request

from treadle_gateway.http.dashboard import layout, shared
from treadle_gateway.http.dashboard.reading import RunView
from treadle_gateway.http.dashboard.series import summary

REFRESH_SECONDS = 2.0
_STATUS_CELL = '<q-td :props="props"><span :class="\'status \' + props.row.status">{{ props.row.status }}</span></q-td>'
_NAME_CELL = """<q-td :props="props"><a class="plain" :href="props.row.href">{{ props.row.label }}</a>
<div class="faint mono" v-if="props.row.id != props.row.label">{{ props.row.id }}</div></q-td>"""
_STEP_CELL = """<q-td :props="props">{{ props.row.step }}<span class="faint" v-if="props.row.planned"> /
{{ props.row.planned }}</span></q-td>"""


def register() -> None:
    """Makes the page known."""

    @ui.page("/", title="Treadle: runs", response_timeout=20)
    async def runs(request: Request) -> None:
        viewer = shared.viewer_of(request)
        with layout.page(request, viewer, "Runs"):
            with ui.element("div").classes("line"):
                ui.label("Runs").classes("title")
                counted = ui.label().classes("faint")
                ui.element("div").classes("spacer")
                search = ui.input(placeholder="Filter").props("dense outlined clearable").style("width:220px")
            with layout.card():
                table = _table(viewer.is_admin)
                search.on_value_change(lambda event: table.set_filter(event.value or ""))
                nothing = ui.element("div").style("width:100%")
                with nothing:
                    layout.empty("No runs yet.", "Start one from a file, or from a program with the Python client.")
                    ui.link("Start a run", "/start").classes("plain").style("align-self:center")

            async def refresh() -> None:
                views = await shared.parts().reader.runs(viewer)
                rows = [_row(view) for view in views]
                running = sum(view.status == "running" for view in views)
                counted.set_text(f"{len(rows)} in all, {running} running" if rows else "")
                table.set_visibility(bool(rows))
                nothing.set_visibility(not rows)
                if rows != table.rows:
                    table.rows = rows

            await shared.live(viewer, REFRESH_SECONDS, refresh)


def _table(is_admin: bool) -> ui.table:
    columns: list[dict[str, Any]] = [  # Any: JSON.
        {"name": "label", "label": "Run", "field": "label", "align": "left", "sortable": True},
        {"name": "status", "label": "Status", "field": "status", "align": "left", "sortable": True},
        {"name": "base", "label": "Base", "field": "base", "align": "left", "sortable": True},
        {"name": "step", "label": "Step", "field": "step", "sortable": True},
        {"name": "loss", "label": "Loss", "field": "loss", "sortable": True},
        {"name": "tokens", "label": "Tokens", "field": "tokens", "sortable": True},
        {"name": "cost", "label": "Cost", "field": "cost", "sortable": True},
        {"name": "created", "label": "Created", "field": "created", "align": "right"},
    ]
    if is_admin:
        columns.insert(1, {"name": "owner", "label": "Owner", "field": "owner", "align": "left", "sortable": True})
    table = ui.table(columns=columns, rows=[], row_key="name", pagination=50).classes("runs").style("width:100%")
    table.props("flat dense")
    table.add_slot("body-cell-status", _STATUS_CELL)
    table.add_slot("body-cell-label", _NAME_CELL)
    table.add_slot("body-cell-step", _STEP_CELL)
    table.add_slot("body-cell-tokens", '<q-td :props="props">{{ props.row.tokens_text }}</q-td>')
    table.add_slot("body-cell-cost", '<q-td :props="props">{{ props.row.cost_text }}</q-td>')
    table.on("rowClick", js_handler="(event, row) => { window.location.href = row.href }")
    return table


def _row(view: RunView) -> dict[str, Any]:  # Any: JSON.
    loss = summary(view.run.latest.values).get("loss")
    price = shared.parts().gateway.settings.price_per_million_tokens
    return {
        "name": view.name,
        "href": href_of(view.name),
        "label": view.label,
        "id": view.name.rpartition("/")[2],
        "owner": view.tenant,
        "status": view.status,
        "base": view.run.base,
        "step": view.step,
        "planned": view.planned_steps,
        "loss": None if loss is None else float(f"{loss:.4g}"),
        "tokens": view.tokens,
        "tokens_text": layout.number(view.tokens) if view.tokens else "",
        "cost": view.cost,
        "cost_text": cost_text(view.cost) if price else "",
        "created": layout.ago(time.time() - view.run.created.ToNanoseconds() / 1e9),
    }


def href_of(run: str) -> str:
    """Returns the address of a run's page."""
    _, tenant, _, name = run.split("/")
    return f"/runs/{tenant}/{name}"


def cost_text(cost: float) -> str:
    """Returns a price, exact to the hundredth or, where it is small, to two digits."""
    return f"{cost:.2f}" if cost >= 0.1 else f"{cost:.2g}"
