"""Group commit, isolation between bodies, and the schema."""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from pydantic import ValidationError
from sqlalchemy import Connection, create_engine, func, insert, select, text

from tests.support.postgres import PostgresServer
from treadle.errors import TreadleError, make_error
from treadle_store.database import MAX_WAITING, Database
from treadle_store.engines import SchemaError, check_url
from treadle_store.settings import StoreSettings
from treadle_store.tables import metadata, tenants


@pytest.fixture
def sqlite(tmp_path: Path) -> Iterator[Database]:
    opened = Database(f"sqlite:///{tmp_path / 'store.db'}")
    yield opened
    opened.close()


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


async def test_a_value_that_no_column_holds_is_bad_input(database: Database) -> None:
    """A zero byte or a huge number is refused alike, and alone, wherever the database notices."""

    def huge(connection: Connection) -> None:
        connection.execute(insert(tenants).values(tenant="huge", created_us=2**64))

    outcomes = await asyncio.gather(database.write(add("a")), database.write(huge), return_exceptions=True)
    assert outcomes[0] == "a"
    assert isinstance(outcomes[1], TreadleError)
    assert outcomes[1].reason == "BAD_VALUE"
    with pytest.raises(TreadleError) as raised:
        await database.read(lambda connection: connection.execute(select(tenants).where(tenants.c.created_us == 2**64)))
    assert raised.value.reason == "BAD_VALUE"


async def test_a_waiting_line_has_an_end(sqlite: Database) -> None:
    """Beyond its bound a write is refused as retryable; those in line are done."""
    hold = threading.Event()
    first = asyncio.create_task(sqlite.write(lambda _: hold.wait(30)))
    await asyncio.sleep(0.05)
    waiting = [asyncio.create_task(sqlite.write(lambda _: 1)) for _ in range(MAX_WAITING)]
    await asyncio.sleep(0)
    with pytest.raises(TreadleError) as raised:
        await sqlite.write(add("late"))
    assert raised.value.reason == "UNAVAILABLE"
    hold.set()
    assert sum(await asyncio.gather(*waiting)) == MAX_WAITING
    await first


async def test_every_sqlite_commit_is_synced(sqlite: Database) -> None:
    """The journal promises durability: FULL is 2, the log is a WAL, foreign keys hold."""

    def pragmas(connection: Connection) -> list[object]:
        queries = ("synchronous", "journal_mode", "foreign_keys")
        return [connection.execute(text(f"PRAGMA {name}")).scalar_one() for name in queries]

    assert await sqlite.write(pragmas) == [2, "wal", 1]


async def test_every_postgresql_commit_is_synced(postgres: PostgresServer) -> None:
    """A server or role that is set to acknowledge before syncing does not do so for the store; readers cannot write."""
    url = postgres.new_database()
    postgres.execute(f"ALTER DATABASE {url.partition('?')[0].rpartition('/')[2]} SET synchronous_commit = off")
    database = Database(url)
    setting = select(func.current_setting("synchronous_commit"))
    assert await database.write(lambda connection: connection.execute(setting).scalar_one()) == "on"
    with pytest.raises(TreadleError):
        await database.read(add("a"))
    database.close()


async def test_a_full_disk_is_unavailable_and_passes(sqlite: Database) -> None:
    """When the file cannot grow, writes are refused as retryable; afterwards they work again."""

    def limit(pages: int):
        return lambda connection: connection.execute(text(f"PRAGMA max_page_count={pages}")).scalar_one()

    def fill(connection: Connection) -> None:
        for i in range(4000):
            connection.execute(insert(tenants).values(tenant=f"filler-{i}", created_us=0))

    await sqlite.write(limit(1))
    with pytest.raises(TreadleError) as raised:
        await sqlite.write(fill)
    assert (raised.value.reason, raised.value.retryable) == ("UNAVAILABLE", True)
    await sqlite.write(limit(1_000_000))
    await sqlite.write(add("after"))
    assert await sqlite.read(names) == ["after"]


def test_the_migrations_make_the_tables(database_url: str) -> None:
    """The schema at the newest version is the one that the code uses."""
    Database(database_url).close()
    Database(database_url).close()
    engine = create_engine(check_url(database_url))
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    engine.dispose()


def test_stores_that_start_together_migrate_once(postgres: PostgresServer) -> None:
    """Each waits for the others and finds the schema made."""
    url = postgres.new_database()
    with ThreadPoolExecutor(4) as pool:
        for opened in list(pool.map(Database, [url] * 4)):
            opened.close()


def test_a_schema_of_a_later_release_is_refused(database_url: str) -> None:
    """Rather than used wrongly."""
    Database(database_url).close()
    engine = create_engine(check_url(database_url))
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    engine.dispose()
    with pytest.raises(SchemaError, match="9999"):
        Database(database_url)


@pytest.mark.parametrize("url", ["nonsense", "mysql://host/db", "sqlite://", "sqlite:///:memory:", "postgresql://host"])
def test_a_database_that_cannot_be_used_is_refused_by_the_settings(url: str) -> None:
    """Before anything is opened."""
    with pytest.raises(ValidationError):
        StoreSettings(database_url=url)


def test_replicas_need_postgresql_and_s3() -> None:
    """Two processes with files of their own would be two truths."""
    with pytest.raises(ValidationError, match="PostgreSQL"):
        StoreSettings(replicas=2)
    with pytest.raises(ValidationError, match="S3"):
        StoreSettings(replicas=2, database_url="postgresql://host/db")
    StoreSettings(replicas=2, database_url="postgresql://host/db", blobs_url="s3://bucket/prefix")
