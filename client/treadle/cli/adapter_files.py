"""Adapters on their way home: a bar while they come, and the engine's conversions in a process of their own.

Knows the terminal; what is in the files is treadle_engine's business, which may not be installed here.
"""

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from treadle.cli.connect import Place
from treadle.client import ServiceClient


def pull(place: Place, service: ServiceClient, name: str, folder: Path) -> None:
    """Downloads an adapter under a bar."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True, quiet=place.format == "json")
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("downloading", total=None)
        service.pull_adapter(name, folder, lambda done, total: progress.update(task, completed=done, total=total))


def convert(place: Place, service: ServiceClient, name: str, folder: Path, what: str, base: str, dtype: str) -> None:
    """Downloads an adapter and writes what `treadle_engine.export` makes of it; raises ClickException."""
    for package in ("treadle_engine", "torch"):
        if importlib.util.find_spec(package) is None:
            raise click.ClickException(f"this needs {package}: pip install 'treadle[engine]'")
    if folder.exists() and any(folder.iterdir()):
        raise click.ClickException(f"{folder} is there already; give a folder that is empty or does not exist")
    weights = base or _folder_of_base(service, name)
    with scratch_folder() as scratch:
        pull(place, service, name, scratch / "adapter")
        asked = {"what": what, "adapter": str(scratch / "adapter"), "out": str(folder), "base": weights, "dtype": dtype}
        command = [sys.executable, "-m", "treadle_engine.export"]
        done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(done.stderr.strip()[-2000:] or "the conversion failed")


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Gives a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="treadle-") as folder:
        yield Path(folder)


def _folder_of_base(service: ServiceClient, name: str) -> str:
    """Returns where the service's base lies, which is also here when the service runs on this machine."""
    base = service.get_adapter(name).base
    models = {model.model_name: model.tokenizer for model in service.get_server_capabilities().supported_models}
    where = models.get(base, "")
    if not where or (where.startswith("/") and not Path(where).is_dir()):
        raise click.ClickException(f"the weights of {base} are not on this machine: give --base FOLDER or a hub name")
    return where
