"""Command-line options made from the fields of a recipe's settings: one place says name, type, default and help.

Imports nothing but click; knows no recipe.
"""

from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import click

Config = TypeVar("Config")
Command = TypeVar("Command", bound=Callable[..., Any])


def config_options(kind: type[Config], argument: str = "data") -> Callable[[Command], Command]:
    """Adds an option per field of the dataclass `kind`; the field `argument` becomes the command's argument.

    The command takes their values by name; `kind(**values)` makes the settings of them.
    """
    hints = get_type_hints(kind)

    def add(command: Command) -> Command:
        for each in reversed(fields(kind)):  # type: ignore[arg-type]  # A dataclass type, which mypy cannot say.
            if each.name == argument:
                command = click.argument(argument)(command)
            else:
                command = _option(each, hints[each.name])(command)
        return command

    return add


def _option(each: "Field[Any]", hint: Any) -> Callable[[Command], Command]:  # Any: types as values.
    flag = "--" + each.name.replace("_", "-")
    text = each.metadata["help"]
    default = None if each.default is MISSING else each.default
    if hint is bool:
        return click.option(f"{flag}/--no-{flag[2:]}", default=default, show_default=True, help=text)
    shown = default not in (None, "")
    return click.option(flag, type=_click_type(hint), default=default, show_default=shown, help=text)


def _click_type(hint: Any) -> Any:  # Any: what click.option takes as a type.
    if get_origin(hint) is Literal:
        return click.Choice(get_args(hint))
    if get_origin(hint) in (Union, UnionType):
        hint = next(part for part in get_args(hint) if part is not type(None))
    assert hint in (int, float, str)
    return hint
