"""Entries that share the statements of a transaction, against the same entries one by one."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, Engine, create_engine, event, select

from tests.store.conftest import entry
from treadle.errors import TreadleError
from treadle.internal.v1 import journal_pb2
from treadle.names import RunName, parse_run
from treadle.v1 import admin_pb2, training_pb2
from treadle_store import catalog, identity, journal, quotas, tables
from treadle_store.journal_entries import RunEntry, write_entries

NOW_US = 1_700_000_000_000_000
ENTRIES = st.lists(
    st.fixed_dictionaries(
        {
            "run": st.integers(0, 2),
            "stale": st.sampled_from([False, False, False, True]),
            "first": st.sampled_from([1, 1, 1, 2, 3]),
            "appends": st.integers(0, 3),
            "commits": st.lists(st.integers(1, 4), max_size=3),
            "acked": st.integers(0, 4),
            "step": st.booleans(),
        }
    ),
    min_size=1,
    max_size=8,
)


@contextmanager
def journal_of_three_runs() -> Iterator[tuple[Connection, list[RunName]]]:
    """An own database with two tenants, one of them with a quota, and three claimed runs."""
    engine = create_engine("sqlite://")
    event.listen(engine, "connect", lambda connection, _: connection.execute("PRAGMA foreign_keys=ON"))
    with engine.begin() as connection:
        tables.metadata.create_all(connection)
        runs = []
        for number, tenant in enumerate(("acme", "acme", "bolt")):
            if number != 1:
                identity.create_tenant(connection, tenant, 0)
            request = training_pb2.CreateRunRequest(base="b", run_id=f"r-{number}")
            runs.append(parse_run(catalog.register_run(connection, tenant, request, 0)[0].name))
            journal.claim_run(connection, journal.Claim(runs[-1], "w", "h:1", 10), NOW_US)
        quotas.set_quota(connection, "acme", admin_pb2.Quota(training_tokens_per_minute=600), NOW_US)
        yield connection, runs
    engine.dispose()


def to_entry(plan: dict, runs: list[RunName]) -> RunEntry:
    appends = [
        journal_pb2.JournalAppend(seq=plan["first"] + place, digest=plan["first"] + place, payload=b"p")
        for place in range(plan["appends"])
    ]
    commits = [journal_pb2.JournalCommit(seq=seq, result=b"r%d" % seq, num_tokens=10 * seq) for seq in plan["commits"]]
    if plan["step"]:
        for commit in commits:
            commit.metrics.step = commit.seq
            commit.metrics.values["loss"] = float(commit.seq)
    message = journal_pb2.JournalEntry(
        epoch=2 if plan["stale"] else 1, appends=appends, commits=commits, acked_seq=plan["acked"]
    )
    return RunEntry(runs[plan["run"]], message, NOW_US)


def outcomes(found: list) -> list:
    return [outcome.reason if isinstance(outcome, TreadleError) else "" for outcome in found]


def content(connection: Connection) -> dict[str, list[tuple]]:
    return {
        table.name: [tuple(row) for row in connection.execute(select(table).order_by(*table.primary_key.columns))]
        for table in tables.metadata.sorted_tables
    }


@settings(max_examples=60, deadline=None)
@given(ENTRIES)
def test_entries_together_do_what_they_do_one_by_one(plans: list[dict]) -> None:
    """The same answers and the same rows in every table, whatever is wrong with some of them."""
    with journal_of_three_runs() as (together, runs), journal_of_three_runs() as (alone, _):
        entries = [to_entry(plan, runs) for plan in plans]
        written = write_entries(together, entries)
        one_by_one = [outcome for item in entries for outcome in write_entries(alone, [item])]
        assert outcomes(written) == outcomes(one_by_one)
        assert content(together) == content(alone)


async def test_many_runs_are_written_with_the_statements_of_one(store) -> None:
    """So that a group commit costs PostgreSQL as many round trips as a lone one."""
    runs = [await store.new_run() for _ in range(12)]
    epochs = [await store.claim(run) for run in runs]
    num_statements = 0

    def count(*_: object) -> None:
        nonlocal num_statements
        num_statements += threading.current_thread().name == "store-writer"

    event.listen(Engine, "before_cursor_execute", count)
    try:
        assert await store.write(entry(runs[0], epochs[0], [1], [1])) == [""]
        alone, num_statements = num_statements, 0
        entries = [entry(run, epoch, [1], [1]) for run, epoch in zip(runs[1:], epochs[1:], strict=True)]
        assert await store.write(*entries) == [""] * 11
    finally:
        event.remove(Engine, "before_cursor_execute", count)
    assert num_statements == alone > 0
