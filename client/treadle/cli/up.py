"""`treadle up`: a whole Treadle on this machine, in the foreground.

Knows only the options; what they do is imported when it is done, so that `--help` is quick.
"""

from pathlib import Path

import click

from treadle.cli.settings import DEFAULT_DATA_DIR


@click.command()
@click.option(
    "--base",
    "bases",
    multiple=True,
    help="smollm2, pip, a folder or a hub name, with @int8 or @nf4 for so many bits; several serve several bases.  "
    "[default: smollm2 if installed, else pip]",
)
@click.option("--trainers", type=click.IntRange(1), default=1, show_default=True, help="Trainers of each base.")
@click.option("--samplers", type=click.IntRange(1), default=1, show_default=True, help="Samplers of each base.")
@click.option("--data-dir", type=click.Path(path_type=Path), default=DEFAULT_DATA_DIR, show_default=True)
@click.option("--cache-dir", type=click.Path(path_type=Path), default="~/.cache/treadle", show_default=True)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address that the gateway listens on.")
@click.option(
    "--allow-plaintext", is_flag=True, help="Let a --host beyond this machine listen without TLS: keys travel readably."
)
@click.option("--port", type=click.IntRange(0, 65_000), default=7600, show_default=True, help="0 takes a free one.")
@click.option(
    "--threads", type=click.IntRange(1), help="Threads of each worker.  [default: the cores over the workers]"
)
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16"]), default="auto", show_default=True)
@click.option(
    "--quantize",
    type=click.Choice(["none", "int8", "nf4"]),
    default="none",
    show_default=True,
    help="Bits of the frozen linears where --base does not say; served as NAME@int8 or NAME@nf4.",
)
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="info")
@click.option(
    "-f",
    "--format",
    "output_format",
    type=click.Choice(["table", "json"]),
    default="table",
    help="json: a line per line of a service, and one with `ready` when all are.",
)
@click.option("--ready-file", type=click.Path(path_type=Path), help="Written when all is ready, like up.json.")
def up(
    *,
    bases: tuple[str, ...],
    trainers: int,
    samplers: int,
    data_dir: Path,
    cache_dir: Path,
    host: str,
    allow_plaintext: bool,
    port: int,
    threads: int | None,
    dtype: str,
    quantize: str,
    log_level: str,
    ready_file: Path | None,
    output_format: str,
) -> None:
    """Start store, trainers, samplers and gateway, and keep them running until Ctrl-C."""
    from treadle.cli.launch import launch

    kept = launch(
        bases=bases,
        trainers=trainers,
        samplers=samplers,
        data_dir=data_dir,
        cache_dir=cache_dir,
        host=host,
        allow_plaintext=allow_plaintext,
        port=port,
        threads=threads,
        dtype=dtype,
        quantize=quantize,
        log_level=log_level,
        ready_file=ready_file,
        as_json=output_format == "json",
    )
    if not kept:
        raise SystemExit(1)
