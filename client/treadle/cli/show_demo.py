"""What `treadle demo` does: a deployment in a folder of its own, two progress bars, tables, a sentence.

Knows processes and the terminal; what the tenants do is in treadle.recipes.demo.
"""

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from treadle.cli.settings import UpFile, admin_key, inherited_environment
from treadle.cli.supervisor import service_command
from treadle.client import ServiceClient
from treadle.recipes.demo import DemoSeen, run_demo
from treadle.recipes.loops import StepReport
from treadle.recipes.tasks import DEMO_TASKS

_START_SECONDS = 300.0
_TENANTS = {"sft": "ada", "rl": "grace"}
_VALUES = {"sft": "loss", "rl": "reward"}


def show_demo(*, base: str, as_json: bool, export: Path | None, kill_at: int | None) -> None:
    """Runs the demo and prints what was seen."""
    console = Console(quiet=as_json)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="treadle-demo-") as scratch:
        folder = export or Path(tempfile.mkdtemp(prefix="treadle-adapter-"))
        console.print(f"Starting store, trainer, sampler and gateway on the base [bold]{base}[/] ...")
        with deployment(base, Path(scratch)) as up:
            ready = time.monotonic() - began
            console.print(f"Ready after {ready:.0f} s at {up.gateway}. Two tenants train at once on one base:")
            keys = new_keys(up, Path(scratch))
            with StepBars(console, up, kill_at) as bars:
                seen = run_demo(up.gateway, keys, up.base, folder, bars.on_step)
    seconds = time.monotonic() - began
    if as_json:
        click.echo(json.dumps({**seen.as_json(), "start_seconds": ready, "seconds": seconds}, indent=2))
        return
    print_seen(console, seen, seconds)


@contextlib.contextmanager
def deployment(base: str, folder: Path) -> Iterator[UpFile]:
    """Runs `treadle up` on a free port until the context ends."""
    ready, log = folder / "ready.json", folder / "up.log"
    # As a child that ends with this process, however that ends.
    command = [*service_command("treadle.cli", os.getpid()), "up", "--base", base, "--port", "0"]
    command += ["--data-dir", str(folder / "data"), "--ready-file", str(ready)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=inherited_environment())
    try:
        deadline = time.monotonic() + _START_SECONDS
        while not ready.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise click.ClickException(f"the services did not start:\n{log.read_text(errors='replace')[-3000:]}")
            time.sleep(0.1)
        yield UpFile(**json.loads(ready.read_text()))
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def new_keys(up: UpFile, scratch: Path) -> tuple[str, str]:
    """Makes the two tenants and returns a key of each."""
    secret = admin_key(scratch / "data")
    with ServiceClient(up.gateway, secret) as service:
        made = []
        for tenant in _TENANTS.values():
            service.create_tenant(tenant)
            made.append(service.create_key(tenant).secret)
    return made[0], made[1]


class StepBars:
    """Two progress bars, one per tenant; kills the trainer once if asked to."""

    def __init__(self, console: Console, up: UpFile, kill_at: int | None) -> None:
        self._console, self._up, self._kill_at = console, up, kill_at
        self._lock = threading.Lock()
        tasks = DEMO_TASKS[up.base]
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn("{task.fields[value]}"),
            TimeElapsedColumn(),
            console=console,
        )
        totals = {"sft": tasks.sft.steps, "rl": tasks.rl.steps}
        names = {"sft": f"supervised: {tasks.sft.name}", "rl": f"reward: {tasks.rl.name}"}
        self._bars: dict[str, TaskID] = {
            kind: self._progress.add_task(f"{tenant:>5}, {names[kind]:<22}", total=totals[kind], value="")
            for kind, tenant in _TENANTS.items()
        }

    def __enter__(self) -> "StepBars":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def on_step(self, kind: str, report: StepReport) -> None:
        """Moves a bar."""
        rate = report.num_tokens / max(report.seconds, 1e-9)
        text = f"{_VALUES[kind]} {report.value:6.3f}  {rate:5.0f} tok/s"
        self._progress.update(self._bars[kind], advance=1, value=text)
        with self._lock:
            if self._kill_at is not None and kind == "sft" and report.step >= self._kill_at:
                self._kill_at = None
                self._console.print(f"[red]kill -9[/] of the trainer (pid {self._up.pids['trainer']})")
                os.kill(self._up.pids["trainer"], signal.SIGKILL)


def print_seen(console: Console, seen: DemoSeen, seconds: float) -> None:
    """Prints samples, the table and the sentence."""
    for tenant, task, samples in (
        (_TENANTS["sft"], seen.sft.task, seen.sft.samples),
        (_TENANTS["rl"], seen.rl.task, seen.rl.samples),
    ):
        table = Table("held-out question", "before", "after", title=f"{tenant}: {task}", title_justify="left")
        for sample in samples[:3]:
            table.add_row(sample.question, sample.before, sample.after)
        console.print(table)
    table = Table("tenant", "task", "first step", "last step", "held-out before", "held-out after", "trained tokens")
    sft, rl, export = seen.sft, seen.rl, seen.export
    table.add_row(
        _TENANTS["sft"],
        f"supervised, {sft.task}",
        f"loss {sft.losses[0]:.3f}",
        f"loss {sft.losses[-1]:.3f}",
        f"{sft.right_before:.0%} in the manner",
        f"{sft.right_after:.0%} in the manner",
        str(sft.num_tokens),
    )
    table.add_row(
        _TENANTS["rl"],
        f"reward, {rl.task}",
        f"reward {rl.rewards[0]:.2f}",
        f"reward {rl.rewards[-1]:.2f}",
        f"reward {rl.reward_before:.2f}",
        f"reward {rl.reward_after:.2f}",
        str(rl.num_tokens),
    )
    console.print(table)
    console.print(
        f"Seen in {seconds:.0f} s: on one {seen.base}, ada's adapter went from {sft.right_before:.0%} to "
        f"{sft.right_after:.0%} held-out answers in the trained manner while grace's held-out reward rose "
        f"{seen.factor:.1f}-fold ({rl.reward_before:.2f} to {rl.reward_after:.2f}); plain transformers + peft gave "
        f"{export.num_equal} of {export.num_asked} answers exactly as the service did, from the adapter that was "
        f"exported to {export.folder}."
    )
