"""INSERT that updates the row that is there, for both databases. Knows no table."""

from collections.abc import Collection, Mapping, Sequence
from functools import cache

from sqlalchemy import Connection, Table
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.sql.dml import Insert


def insert_or_update(
    connection: Connection,
    table: Table,
    rows: Sequence[Mapping[str, object]],
    *,
    add: Collection[str] = (),
    replace: Collection[str] = (),
) -> None:
    """Inserts rows; where the primary key is taken, adds to the columns `add` and replaces the columns `replace`."""
    if rows:
        statement = _statement(connection.dialect.name, table, tuple(add), tuple(replace))
        connection.execute(statement, [dict(row) for row in rows])


@cache
def _statement(dialect: str, table: Table, add: tuple[str, ...], replace: tuple[str, ...]) -> Insert:
    statement = postgresql.insert(table) if dialect == "postgresql" else sqlite.insert(table)
    change = {name: table.c[name] + statement.excluded[name] for name in add}
    change |= {name: statement.excluded[name] for name in replace}
    return statement.on_conflict_do_update(index_elements=list(table.primary_key.columns), set_=change)
