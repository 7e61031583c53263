"""`treadle demo`: starts a Treadle of its own, lets two tenants train on it at once, and shows what they saw.

Knows only the options; what they do is imported when it is done, so that `--help` is quick.
"""

from pathlib import Path

import click


@click.command()
@click.option("--base", type=click.Choice(["smollm2", "pip"]), default="smollm2", show_default=True)
@click.option("-f", "--format", "output_format", type=click.Choice(["table", "json"]), default="table")
@click.option("--json", "as_json", is_flag=True, help="The same as -f json: print nothing but a JSON summary.")
@click.option("--export", type=click.Path(path_type=Path), help="Where the PEFT folder goes.  [default: a new folder]")
@click.option("--kill-trainer-at-step", type=click.IntRange(1), help="kill -9 the trainer after this many steps.")
def demo(
    *, base: str, output_format: str, as_json: bool, export: Path | None, kill_trainer_at_step: int | None
) -> None:
    """Two tenants fine-tune two adapters on one warm base at the same time, then sample from both."""
    from treadle.cli.show_demo import show_demo

    show_demo(base=base, as_json=as_json or output_format == "json", export=export, kill_at=kill_trainer_at_step)
