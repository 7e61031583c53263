"""Prints rows as a table for people or as JSON for programs."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import click

from treadle.cli.connect import Place

# Any: a cell is whatever JSON can hold.
Row = Mapping[str, Any]


def print_rows(place: Place, rows: Sequence[Row], empty: str) -> None:
    """Prints many rows of the same columns; `empty` is the sentence for none."""
    if place.format == "json":
        click.echo(json.dumps([dict(row) for row in rows], indent=2))
        return
    if not rows:
        click.echo(empty)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(*rows[0], box=None, header_style="bold", pad_edge=False)
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    # Wide enough for any name: cells must stay whole so that they can be copied.
    Console(soft_wrap=True, width=max(80, 1 + sum(_widths(rows)))).print(table)


def print_row(place: Place, row: Row) -> None:
    """Prints one thing, a line per field."""
    if place.format == "json":
        click.echo(json.dumps(dict(row), indent=2))
        return
    for name, value in row.items():
        click.echo(f"{name + ':':<16} {_cell(value)}")


def _widths(rows: Sequence[Row]) -> list[int]:
    return [2 + max(len(name), *(len(_cell(row[name])) for row in rows)) for name in rows[0]]


def _cell(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{key}={item}" for key, item in value.items())
    return "" if value is None else str(value)
