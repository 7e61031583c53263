"""`treadle top`: what the deployment does right now: workers with their passes and queues, runs with their losses.

Knows the SDK and the terminal. Numbers are over the last seconds, from what workers keep of their timelines.
"""

from typing import TYPE_CHECKING, Any

import click

from treadle.cli.connect import Place, place_options

if TYPE_CHECKING:
    from rich.console import Group

    from treadle.client import ServiceClient

Row = dict[str, Any]  # Any: a cell is whatever JSON can hold.
_RUNS = 15


@click.command()
@click.option("--interval", type=click.FloatRange(0.2), default=2.0, show_default=True, help="Seconds between looks.")
@click.option("--window", type=click.FloatRange(1), default=10.0, show_default=True, help="Seconds to average over.")
@click.option("--once", is_flag=True, help="Look once and end, as -f json always does.")
@place_options
def top(place: Place, *, interval: float, window: float, once: bool) -> None:
    """Watch workers, queues, passes, tokens per second and runs until Ctrl-C.

    Queues are shown to keys with the scope admin.
    """
    import contextlib
    import json
    import time

    from rich.console import Console
    from rich.live import Live

    from treadle.cli.connect import open_service

    with open_service(place) as service:
        if place.format == "json":
            click.echo(json.dumps(look(service, window), indent=2))
            return
        console = Console()
        if once:
            console.print(_drawn(look(service, window)))
            return
        live = Live(console=console, screen=console.is_terminal, auto_refresh=False)
        with contextlib.suppress(KeyboardInterrupt), live:
            while True:
                live.update(_drawn(look(service, window)), refresh=True)
                time.sleep(interval)


def look(service: "ServiceClient", window: float) -> dict[str, list[Row]]:
    """Returns a row per worker and per run, newest run first."""
    import time

    from treadle.errors import AccessError

    try:
        listed = {worker.worker: worker for worker in service.list_workers()}
    except AccessError:
        listed = {}
    now = time.time()
    workers = []
    for timeline in service.list_spans(now - window):
        known = listed.get(timeline.worker)
        spans = timeline.spans
        workers.append(
            {
                "worker": timeline.worker,
                "base": timeline.base,
                "resident": known.num_resident if known else None,
                "queue": known.queue_depth if known else None,
                "load": round(known.load, 2) if known and known.load is not None else None,
                "passes/s" if timeline.kind == "trainer" else "steps/s": round(
                    sum(span.num_decode_steps or 1 for span in spans) / window, 1
                ),
                "tokens/s": round(sum(span.num_tokens for span in spans) / window),
                "busy": round(min(1.0, sum(span.took for span in spans) / window), 2),
                "sharers": round(sum(len(span.shares) for span in spans) / max(1, len(spans)), 1),
            }
        )
    return {"workers": workers, "runs": [_run_row(run, now) for run in service.list_runs()[:_RUNS]]}


def _run_row(run: Any, now: float) -> Row:  # Any: RunInfo, imported late.
    latest = run.latest
    return {
        "run": run.name,
        "recipe": run.metadata.get("recipe") or run.metadata.get("name"),
        "base": run.base,
        "step": latest.step if latest else 0,
        "loss": round(latest.values["loss:sum"], 4) if latest and "loss:sum" in latest.values else None,
        "worker": run.worker or None,
        "unfinished": max(0, run.next_seq - 1 - run.last_done_seq),
        "idle_s": round(now - latest.time.timestamp()) if latest else None,
    }


def _drawn(seen: dict[str, list[Row]]) -> "Group":
    from rich.console import Group
    from rich.table import Table

    tables = []
    for title, rows in seen.items():
        names = list(dict.fromkeys(name for row in rows for name in row))
        table = Table(*names, title=f"{title}: {len(rows)}", title_justify="left", box=None, header_style="bold")
        for row in rows:
            # Of long names the last part is what tells them apart.
            cells = (str(row[name]).rpartition("/")[2] if name == "run" else row.get(name) for name in names)
            table.add_row(*("" if cell is None else str(cell) for cell in cells))
        tables.append(table)
    return Group(*tables)
