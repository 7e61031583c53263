"""Help is quick because it imports nothing heavy."""

import json
import subprocess
import sys

import click
import pytest

from treadle.cli import COMMANDS
from treadle.cli.lazy import LazyGroup

SHOW_MODULES = """
import json, sys
from treadle.cli import main
sys.argv = ["treadle", *json.loads(sys.argv[1])]
try:
    main()
finally:
    print("\\n" + json.dumps(sorted(sys.modules)), file=sys.stderr)
"""
HEAVY = {"grpc", "numpy", "torch", "google.protobuf", "asyncio", "rich", "pydantic"}


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in COMMANDS)])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    """For the program and for each of its commands."""
    command = [sys.executable, "-c", SHOW_MODULES, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Usage: treadle")
    assert not HEAVY & set(json.loads(done.stderr.splitlines()[-1]))


def test_every_command_answers_in_json_too() -> None:
    """With -f json, groups' commands included."""
    group = LazyGroup(COMMANDS)
    found = [group.get_command(None, name) for name in COMMANDS]  # type: ignore[arg-type]
    while found:
        command = found.pop()
        assert command is not None
        if isinstance(command, click.Group):
            found += command.commands.values()
        else:
            assert any("-f" in parameter.opts for parameter in command.params), command.name


def test_every_listed_command_can_be_imported() -> None:
    """Under the name that the list gives it."""
    group = LazyGroup(COMMANDS)
    for name in COMMANDS:
        command = group.get_command(None, name)  # type: ignore[arg-type]
        assert command is not None
        assert command.name == name
        assert command.help
