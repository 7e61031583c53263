"""Who shares the next pass."""

import math
from collections import Counter
from itertools import islice, repeat

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


def test_who_comes_during_a_pass_goes_before_the_next_large_chunk() -> None:
    """A flood alone saves up no credit for the chunk after the one that it got; a synchronous tenant waits for one."""
    scheduler: FairScheduler[Chunk] = FairScheduler(1024)
    flood = [queue(f"f{index}", "flooder", *[1024] * 4) for index in range(4)]
    light = queue("small", "other", 256)
    passes = [scheduler.pick([*flood, *([light] if number % 2 else [])]) for number in range(10)]
    assert [("small", 0) in picked for picked in passes] == [False, True] * 5


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


def test_a_pass_ends_near_its_target_duration() -> None:
    """Chunks are taken while they fit the time left; one that is longer by itself goes alone."""
    scheduler: FairScheduler[Chunk] = FairScheduler(4096)
    slow = RunQueue("a", "x", [Waiting(100, ("a", index), 0.1) for index in range(5)])
    assert len(scheduler.pick([slow], max_seconds=0.35)) == 3
    endless = RunQueue("b", "x", [Waiting(100, ("b", index), 9.0) for index in range(2)])
    assert scheduler.pick([endless], max_seconds=0.35) == [("b", 0)]


def test_small_chunks_ride_along_where_a_large_one_does_not_fit() -> None:
    """The room that a large chunk leaves is used, and the large one begins the next pass."""
    scheduler: FairScheduler[Chunk] = FairScheduler(1500)
    queues = [queue("a", "x", 1000), queue("b", "y", 1000), queue("c", "z", 100)]
    assert set(scheduler.pick(queues)) == {("a", 0), ("c", 0)}
    assert scheduler.pick([queue("a", "x", 1000), queue("b", "y", 1000)])[0] == ("b", 0)


BACKLOG = st.lists(st.integers(64, 1024), min_size=1, max_size=5)


def endless(run: str, tenant: str, sizes: list[int], done: int) -> RunQueue[Chunk]:
    """Returns the next chunks of a run that never ends."""
    upcoming = [sizes[index % len(sizes)] for index in range(done, done + 64)]
    return RunQueue(run, tenant, [Waiting(size, (run, size), size / 1e4) for size in upcoming])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("xyz"), BACKLOG), min_size=2, max_size=6),
    st.integers(1024, 4096),
    st.floats(0.05, 0.5),
)
def test_tenants_with_work_get_equal_tokens_at_any_time(
    runs: list[tuple[str, list[int]]], budget: int, max_seconds: float
) -> None:
    """Whatever the sizes of chunks, the numbers of runs and the pass's limits, nobody gets ahead by more than a bit."""
    scheduler: FairScheduler[Chunk] = FairScheduler(budget)
    done = [0] * len(runs)
    tokens: Counter[str] = Counter({tenant: 0 for tenant, _ in runs})
    for _ in range(50):
        queues = [endless(str(i), tenant, sizes, done[i]) for i, (tenant, sizes) in enumerate(runs)]
        picked = scheduler.pick(queues, max_seconds)
        assert len(picked) == 1 or sum(size for _, size in picked) <= min(budget, 1e4 * max_seconds + 1e-6)
        for run, size in picked:
            done[int(run)] += 1
            tokens[runs[int(run)][0]] += size
        assert max(tokens.values()) - min(tokens.values()) <= 4 * 1024


@settings(max_examples=60, deadline=None)
@given(st.lists(BACKLOG, min_size=1, max_size=5), st.integers(1, 128), st.integers(0, 30), st.floats(0.01, 0.5))
def test_a_small_operation_starts_within_two_passes_per_tenant(
    floods: list[list[int]], size: int, before: int, max_seconds: float
) -> None:
    """Whenever it arrives, and however much the others have queued."""
    scheduler: FairScheduler[Chunk] = FairScheduler(4096)
    done = [0] * len(floods)

    def passes():
        for small in [*repeat([], before), *repeat([queue("small", "small", size)], 2 * len(floods) + 1)]:
            queues = [endless(str(i), f"t{i}", sizes, done[i]) for i, sizes in enumerate(floods)]
            picked = scheduler.pick([*queues, *small], max_seconds)
            for run, _ in picked:
                if run != "small":
                    done[int(run)] += 1
            yield picked

    later = list(islice(passes(), before, None))
    assert any(("small", 0) in picked for picked in later)


def test_without_a_target_the_tokens_alone_count() -> None:
    """Where nothing was measured every chunk takes no time."""
    scheduler: FairScheduler[Chunk] = FairScheduler(2048)
    assert len(scheduler.pick([queue("a", "x", *[512] * 8)], math.inf)) == 4
