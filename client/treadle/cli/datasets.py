"""`treadle dataset`: completions that were kept, as data for a fine-tuning."""

from pathlib import Path

import click

from treadle.cli.connect import Place, open_service, place_options
from treadle.cli.output import print_row, print_rows


def _entries(_context: click.Context, _option: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """Returns `KEY=VALUE` words as a mapping."""
    pairs = [value.partition("=") for value in values]
    wrong = [key for key, sign, _ in pairs if not (key and sign)]
    if wrong:
        raise click.BadParameter(f"{wrong[0]!r} is not KEY=VALUE")
    return {key: value for key, _, value in pairs}


def _filter_options(command: click.decorators.FC) -> click.decorators.FC:
    command = click.option(
        "--metadata",
        metavar="KEY=VALUE",
        multiple=True,
        callback=_entries,
        help="Only with this entry in their metadata; may be given several times.",
    )(command)
    return click.option("--model", default="", help="Only those that this model answered.")(command)


@click.group()
def dataset() -> None:
    """Look at, export and delete the completions that your tenant keeps."""


@dataset.command("list")
@_filter_options
@place_options
def list_(place: Place, model: str, metadata: dict[str, str]) -> None:
    """List kept completions, oldest first."""
    with open_service(place) as service:
        found = service.list_completions(model, metadata)
    rows = [
        {
            "completion": completion.id,
            "model": completion.model,
            "created": completion.created.isoformat(),
            "bytes": completion.size,
            "metadata": dict(completion.metadata),
        }
        for completion in found
    ]
    print_rows(place, rows, "no completions are kept")


@dataset.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@_filter_options
@click.option("--with-cut", is_flag=True, help="Also answers that ended at their limit of tokens.")
@place_options
def export(place: Place, file: Path, model: str, metadata: dict[str, str], *, with_cut: bool) -> None:
    """Write kept completions to FILE (.jsonl), which `treadle sft` takes as it is."""
    with open_service(place) as service:
        written = service.export_completions(file, model, metadata, with_cut=with_cut)
    print_row(place, {"file": str(file), "conversations": written.num_conversations, "cut": written.num_cut})


@dataset.command()
@click.argument("completions", nargs=-1)
@_filter_options
@click.option("--all", "everything", is_flag=True, help="All that are kept.")
@place_options
def delete(
    place: Place, completions: tuple[str, ...], model: str, metadata: dict[str, str], *, everything: bool
) -> None:
    """Delete the COMPLETIONS, or all that --model and --metadata name."""
    if bool(completions) == bool(model or metadata or everything):
        raise click.UsageError("give either completions, or --model, --metadata or --all")
    with open_service(place) as service:
        for completion in completions:
            service.delete_completion(completion)
        num_deleted = len(completions) or service.delete_completions(model, metadata)
    print_row(place, {"deleted": num_deleted})
