"""Group commit, isolation between bodies, and the schema."""

import asyncio
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from pydantic import ValidationError
from sqlalchemy import Connection, create_engine, insert, select, text

from treadle.errors import TreadleError, make_error
from treadle_store.database import Database
from treadle_store.settings import StoreSettings
from treadle_store.tables import metadata, tenants


def add(tenant: str, error: Exception | None = None):
    def body(connection: Connection) -> str:
        connection.execute(insert(tenants).values(tenant=tenant, created_us=0))
        if error is not None:
            raise error
        return tenant

    return body


def names(connection: Connection) -> list[str]:
    return list(connection.execute(select(tenants.c.tenant).order_by(tenants.c.tenant)).scalars())


async def test_each_body_fails_alone(database: Database) -> None:
    """An error, a fault and a broken constraint roll back their own body and no other."""
    bodies = [add("a"), add("b", make_error("BAD_VALUE", "no")), add("c"), add("a"), add("d", KeyError("bug"))]
    outcomes = await asyncio.gather(*(database.write(body) for body in bodies), return_exceptions=True)
    assert [type(outcome).__name__ for outcome in outcomes] == [
        "str", "BadInputError", "str", "IntegrityError", "KeyError",
    ]  # fmt: skip
    assert await database.read(names) == ["a", "c"]


async def test_a_group_is_one_transaction(database: Database) -> None:
    """write_all answers values and errors in order."""
    outcomes = await database.write_all([add("a"), add("b", make_error("SEQ_GAP", "no")), add("c")])
    assert (outcomes[0], outcomes[2]) == ("a", "c")
    assert isinstance(outcomes[1], TreadleError)


async def test_many_writers_share_commits(database: Database) -> None:
    """Five hundred concurrent writes all land."""
    await asyncio.gather(*(database.write(add(f"t{i}")) for i in range(500)))
    assert len(await database.read(names)) == 500


async def test_readers_cannot_write_under_the_writer(database: Database) -> None:
    """A reader that began before a commit sees the state before it."""

    def look_twice(connection: Connection) -> tuple[int, int]:
        before = len(names(connection))
        asyncio.run_coroutine_threadsafe(database.write(add("late")), loop).result()
        return before, len(names(connection))

    loop = asyncio.get_running_loop()
    assert await database.read(look_twice) == (0, 0)
    assert await database.read(names) == ["late"]


async def test_every_commit_is_synced(database: Database) -> None:
    """The journal promises durability: FULL is 2, the log is a WAL, foreign keys hold."""

    def pragmas(connection: Connection) -> list[object]:
        queries = ("synchronous", "journal_mode", "foreign_keys")
        return [connection.execute(text(f"PRAGMA {name}")).scalar_one() for name in queries]

    assert await database.write(pragmas) == [2, "wal", 1]


async def test_a_full_disk_is_unavailable_and_passes(database: Database) -> None:
    """When the file cannot grow, writes are refused as retryable; afterwards they work again."""

    def limit(pages: int):
        return lambda connection: connection.execute(text(f"PRAGMA max_page_count={pages}")).scalar_one()

    def fill(connection: Connection) -> None:
        for i in range(4000):
            connection.execute(insert(tenants).values(tenant=f"filler-{i}", created_us=0))

    await database.write(limit(1))
    with pytest.raises(TreadleError) as raised:
        await database.write(fill)
    assert (raised.value.reason, raised.value.retryable) == ("UNAVAILABLE", True)
    await database.write(limit(1_000_000))
    await database.write(add("after"))
    assert await database.read(names) == ["after"]


def test_the_migrations_make_the_tables(tmp_path: Path) -> None:
    """The schema at the newest version is the one that the code uses."""
    url = f"sqlite:///{tmp_path / 'store.db'}"
    Database(url).close()
    Database(url).close()
    engine = create_engine(url)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    engine.dispose()


@pytest.mark.parametrize("url", ["nonsense", "postgresql://host/db", "sqlite://"])
def test_a_database_that_cannot_be_used_is_refused_by_the_settings(url: str) -> None:
    """Before anything is opened."""
    with pytest.raises(ValidationError):
        StoreSettings(database_url=url)
