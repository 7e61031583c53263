"""The recipes as commands: `treadle sft`, `treadle rl` and the others. Options are the fields of their settings.

Knows the settings; what a recipe does is imported when it is done, so that `--help` is quick.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from treadle.cli.config_options import config_options
from treadle.cli.connect import Place, place_options
from treadle.recipes.configs import SftConfig, TrainConfig

if TYPE_CHECKING:
    from treadle.client import ServiceClient
    from treadle.recipes.reports import Observer

Command = TypeVar("Command", bound=Callable[..., Any])
# Any: each recipe returns a dataclass of its own.
Recipe = Callable[["ServiceClient", Any, "Observer"], Any]


def _common(config: type[TrainConfig]) -> Callable[[Command], Command]:
    """Adds the options of a recipe, in the order in which help shows them."""

    def add(command: Command) -> Command:
        command = place_options(command)
        command = click.option(
            "--track", multiple=True, metavar="KIND[:WHERE]", help="tensorboard, wandb, trackio or jsonl; repeatable."
        )(command)
        command = click.option("--dry-run", is_flag=True, help="Only print what would be trained on.")(command)
        return config_options(config)(command)

    return add


@click.command()
@_common(SftConfig)
def sft(place: Place, *, track: tuple[str, ...], dry_run: bool, **options: Any) -> None:
    """Fine-tune an adapter on the rows of DATA: prompt and response, messages, or text.

    DATA is a file (.jsonl, .json, .csv, .tsv, .parquet), a folder, or hf:NAME.
    """
    from treadle.recipes.sft import sft as recipe

    config = SftConfig(**options)
    if dry_run:
        from treadle.cli.preview import preview_sft

        preview_sft(place, config)
    else:
        _run(place, recipe, config, track)


def _run(place: Place, recipe: Recipe, config: TrainConfig, track: tuple[str, ...]) -> None:
    """Runs a recipe to its end under a bar, and prints what came of it."""
    from dataclasses import asdict

    from rich.console import Console

    from treadle.cli.connect import open_service
    from treadle.cli.output import print_row
    from treadle.cli.watching import TerminalObserver
    from treadle.recipes.job import StoppedError
    from treadle.recipes.reports import Observers
    from treadle.recipes.trackers import open_tracker

    terminal = TerminalObserver(Console(stderr=True, quiet=place.format == "json"))
    with open_service(place) as service:
        observers = Observers([terminal, *map(open_tracker, track)])
        try:
            with terminal.stops_on_interrupt():
                result = recipe(service, config, observers)
        except StoppedError as stopped:
            click.echo(f"{stopped}; go on with --resume {stopped.run}", err=True)
            raise SystemExit(130) from None
        finally:
            observers.close()
    print_row(place, asdict(result))
    if place.format == "table":
        click.echo(f"\ntalk to it     treadle chat {result.revision}")
        click.echo(f"take it home   treadle adapter export {result.revision} FOLDER")
