"""The recipes as commands: `treadle sft`, `treadle rl` and the others. Options are the fields of their settings.

Knows the settings; what a recipe does is imported when it is done, so that `--help` is quick.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from treadle.cli.config_options import config_options
from treadle.cli.connect import Place, place_options
from treadle.recipes.configs import DistillConfig, DpoConfig, EvalConfig, RlConfig, SftConfig, TrainConfig

if TYPE_CHECKING:
    from treadle.client import ServiceClient
    from treadle.recipes.reports import Observer

Command = TypeVar("Command", bound=Callable[..., Any])
# Any: each recipe returns a dataclass of its own.
Recipe = Callable[["ServiceClient", Any, "Observer"], Any]
Preview = Callable[[Place, Any], None]


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
    from treadle.cli.preview import preview_sft
    from treadle.recipes.sft import sft as recipe

    _run(place, recipe, SftConfig(**options), track, preview_sft if dry_run else None)


@click.command()
@_common(RlConfig)
def rl(place: Place, *, track: tuple[str, ...], dry_run: bool, **options: Any) -> None:
    """Train an adapter on its own answers to the prompts of DATA, scored by --reward.

    The reward function gets the row as a dict and the completion as text, and returns a number.
    """
    from treadle.cli.preview import preview_prompts
    from treadle.recipes.rl import rl as recipe

    _run(place, recipe, RlConfig(**options), track, preview_prompts if dry_run else None)


@click.command()
@_common(DpoConfig)
def dpo(place: Place, *, track: tuple[str, ...], dry_run: bool, **options: Any) -> None:
    """Train an adapter to prefer the chosen over the rejected responses of DATA."""
    from treadle.cli.preview import preview_dpo
    from treadle.recipes.dpo import dpo as recipe

    _run(place, recipe, DpoConfig(**options), track, preview_dpo if dry_run else None)


@click.command()
@_common(DistillConfig)
def distill(place: Place, *, track: tuple[str, ...], dry_run: bool, **options: Any) -> None:
    """Train an adapter to answer the prompts of DATA as --teacher would."""
    from treadle.cli.preview import preview_prompts
    from treadle.recipes.distill import distill as recipe

    _run(place, recipe, DistillConfig(**options), track, preview_prompts if dry_run else None)


@click.command("eval")
@config_options(EvalConfig)
@place_options
def eval_(place: Place, **options: Any) -> None:
    """Measure how a saved adapter or a base does on the rows of DATA."""
    from dataclasses import asdict

    from rich.console import Console

    from treadle.cli.connect import open_service
    from treadle.cli.output import print_row
    from treadle.cli.watching import TerminalObserver
    from treadle.recipes.evaluate import evaluate

    observer = TerminalObserver(Console(stderr=True, quiet=place.format == "json"), "evaluating")
    with open_service(place) as service:
        try:
            result = evaluate(service, EvalConfig(**options), observer)
        finally:
            observer.close()
    print_row(place, asdict(result))


def _run(
    place: Place, recipe: Recipe, config: TrainConfig, track: tuple[str, ...], preview: Preview | None = None
) -> None:
    """Runs a recipe to its end under a bar, and prints what came of it; or only shows what it would train on."""
    if preview is not None:
        preview(place, config)
        return
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
