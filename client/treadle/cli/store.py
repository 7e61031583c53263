"""`treadle store`: checks, cleans, copies and restores what an adapter store keeps, without the service.

Knows only the options; the work is the store's own package, which is looked up by name when it is needed.
"""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import click

from treadle.cli.settings import DEFAULT_DATA_DIR

Command = TypeVar("Command", bound=Callable[..., None])


@click.group()
def store() -> None:
    """Check, clean, copy and restore a store's data; settings as the store's (TREADLE_STORE_...)."""


def _place_options(command: Command) -> Command:
    """Adds the options that say where the store's data are."""
    for option in (
        click.option("-f", "--format", "output_format", type=click.Choice(["table", "json"]), default="table"),
        click.option("--blobs-url", help="Its blobs, if not in the folder: s3://bucket/prefix."),
        click.option("--database-url", help="Its database, if not in the folder."),
        click.option(
            "--data-dir",
            type=click.Path(path_type=Path),
            default=DEFAULT_DATA_DIR,
            envvar="TREADLE_STORE_DATA_DIR",
            show_default=True,
            help="The store's folder.",
        ),
    ):
        command = option(command)
    return command


@store.command()
@_place_options
@click.option("--quick", is_flag=True, help="Do not read the blobs' contents.")
@click.option("--json", "as_json", is_flag=True, help="The same as -f json.")
def fsck(*, quick: bool, as_json: bool, output_format: str, **place: Any) -> None:
    """Prove that everything fits together; exit with 1 if not. The store may run."""
    if not _maintenance().fsck(_given(place), quick=quick, as_json=as_json or output_format == "json"):
        raise SystemExit(1)


@store.command()
@_place_options
@click.option("--dry-run", is_flag=True, help="Only count what no row names.")
def gc(*, dry_run: bool, output_format: str, **place: Any) -> None:
    """Remove what nobody needs, past its grace. The store may run; it does this by itself as well."""
    _maintenance().gc(_given(place), dry_run=dry_run, as_json=output_format == "json")


@store.command()
@click.argument("target", type=click.Path(path_type=Path))
@_place_options
def backup(*, target: Path, output_format: str, **place: Any) -> None:
    """Copy the store to the new folder TARGET. The store may run; the copy is one moment of it."""
    _maintenance().backup(_given(place), target, as_json=output_format == "json")


@store.command()
@click.argument("source", type=click.Path(path_type=Path, exists=True, file_okay=False))
@_place_options
def restore(*, source: Path, output_format: str, **place: Any) -> None:
    """Copy the backup SOURCE into an empty place where no store runs; workers of before are fenced off."""
    _maintenance().bring_back(_given(place), source, as_json=output_format == "json")


def _given(place: dict[str, Any]) -> dict[str, Any]:  # options are of any type
    given = {name: value for name, value in place.items() if value is not None}
    return {**given, "data_dir": given["data_dir"].expanduser()}


def _maintenance() -> Any:  # a module that this package must not name: it may not be installed
    try:
        return import_module("treadle_store.maintenance")
    except ModuleNotFoundError as error:
        raise click.ClickException(
            f"this needs the store's packages ({error.name}): pip install 'treadle[store]'"
        ) from error
