"""`treadle completion`: what a shell needs to complete commands and options.

Knows click's own scripts and nothing of the commands.
"""

import click


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.option("-f", "--format", "output_format", type=click.Choice(["table", "json"]), default="table")
def completion(shell: str, output_format: str) -> None:
    """Print the completion script of SHELL; for bash: eval "$(treadle completion bash)" in ~/.bashrc."""
    import json

    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    root = click.get_current_context().find_root().command
    script = kind(root, {}, "treadle", "_TREADLE_COMPLETE").source()
    click.echo(json.dumps({"shell": shell, "script": script}) if output_format == "json" else script)
