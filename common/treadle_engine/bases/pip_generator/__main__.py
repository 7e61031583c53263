"""Command line of the generator: `python -m treadle_engine.bases.pip_generator --out DIR`."""

from __future__ import annotations

from pathlib import Path

import click
import torch

from treadle_engine.bases.pip_generator.train import generate


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write the base to.")
@click.option("--tokens", default=2_000_000, show_default=True, help="Training tokens; 2 M take about 8 CPU-minutes.")
@click.option("--seed", default=0, show_default=True)
@click.option("--threads", default=1, show_default=True, help="torch threads; part of what fixes the exact bits.")
def main(out: Path, tokens: int, seed: int, threads: int) -> None:
    """Make Pip, a 0.87 M parameter base: write corpus and tokenizer, train, and save a Hugging Face folder."""
    torch.set_num_threads(threads)
    loss = generate(out, tokens, seed, _report)
    click.echo(f"loss {loss:.3f}; wrote {out}")


def _report(step: int, num_steps: int, loss: float) -> None:
    click.echo(f"step {step}/{num_steps}  loss {loss:.3f}")


if __name__ == "__main__":
    main()
