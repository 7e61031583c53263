"""Who shares the next pass."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from treadle_trainer.scheduler import FairScheduler, RunQueue, Waiting

Chunk = tuple[str, int]


def queue(run: str, tenant: str, *sizes: int) -> RunQueue[Chunk]:
    return RunQueue(run, tenant, [Waiting(size, (run, index)) for index, size in enumerate(sizes)])


def test_everything_that_fits_shares_one_pass() -> None:
    """Runs of several tenants merge, each run's chunks together and in order."""
    scheduler: FairScheduler[Chunk] = FairScheduler(4096)
    picked = scheduler.pick([queue("a", "x", 100, 100), queue("b", "y", 200), queue("c", "x", 50)])
    assert sorted(picked) == [("a", 0), ("a", 1), ("b", 0), ("c", 0)]
    assert picked.index(("a", 1)) == picked.index(("a", 0)) + 1


def test_a_chunk_above_the_budget_goes_alone() -> None:
    """It is neither refused nor merged."""
    scheduler: FairScheduler[Chunk] = FairScheduler(1000)
    assert scheduler.pick([queue("a", "x", 5000, 10)]) == [("a", 0)]


def test_a_flood_delays_another_tenant_by_at_most_one_pass() -> None:
    """Twenty runs full of work share with one small operation at once."""
    scheduler: FairScheduler[Chunk] = FairScheduler(2048)
    flood = [queue(f"f{index}", "flooder", *[1024] * 16) for index in range(20)]
    passes = [scheduler.pick([*flood, queue("small", "other", 100)]) for _ in range(2)]
    assert any(chunk == ("small", 0) for picked in passes for chunk in picked)


def test_tenants_get_equal_tokens_whatever_their_number_of_runs() -> None:
    """Four runs of one tenant get as much as one run of another."""
    scheduler: FairScheduler[Chunk] = FairScheduler(2048)
    left = {"a1": 100, "a2": 100, "a3": 100, "a4": 100, "b1": 100}
    tokens: Counter[str] = Counter()
    for _ in range(40):
        queues = [queue(run, run[0], *[512] * count) for run, count in left.items()]
        for run, _index in scheduler.pick(queues):
            left[run] -= 1
            tokens[run[0]] += 512
    assert abs(tokens["a"] - tokens["b"]) <= 2048


def test_runs_of_a_tenant_take_turns() -> None:
    """No run of a tenant starves behind its sibling."""
    scheduler: FairScheduler[Chunk] = FairScheduler(1024)
    picked = [scheduler.pick([queue("a", "x", *[1024] * 4), queue("b", "x", *[1024] * 4)])[0][0] for _ in range(4)]
    assert Counter(picked) == {"a": 2, "b": 2}


SIZES = st.lists(st.integers(1, 3000), max_size=6)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("xyz"), SIZES), max_size=6), st.integers(64, 4096))
def test_all_work_is_done_in_order_within_the_budget(runs: list[tuple[str, list[int]]], budget: int) -> None:
    """Whatever waits, each pass keeps the budget, makes progress, and keeps each run's order."""
    scheduler: FairScheduler[Chunk] = FairScheduler(budget)
    left = {f"r{index}": (tenant, list(enumerate(sizes))) for index, (tenant, sizes) in enumerate(runs)}
    while any(chunks for _, chunks in left.values()):
        queues = [
            RunQueue(run, tenant, [Waiting(size, (run, index)) for index, size in chunks])
            for run, (tenant, chunks) in left.items()
        ]
        picked = scheduler.pick(queues)
        assert picked
        total = 0
        for run, index in picked:
            expected, size = left[run][1].pop(0)
            assert index == expected
            total += size
        assert total <= budget or len(picked) == 1
    assert scheduler.pick([]) == []
