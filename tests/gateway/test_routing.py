"""Who gets a run, a revision, a base."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treadle.errors import UnavailableError
from treadle_gateway.routing import Holder, WorkerTable, WorkerView, pick_sampler, pick_trainer, place, rank

RUN = "tenants/acme/runs/r-1"


def trainers(*names: str, base: str = "pip") -> WorkerTable:
    return WorkerTable().refreshed(WorkerView(name, "trainer", base, f"{name}:1") for name in names)


def samplers(**depths: int) -> WorkerTable:
    return WorkerTable().refreshed(WorkerView(n, "sampler", "pip", f"{n}:1", depth) for n, depth in depths.items())


def test_a_held_run_goes_to_its_holder() -> None:
    """The lease decides, whatever the hash says."""
    table = trainers("t0", "t1", "t2")
    assert {pick_trainer(table, RUN, "pip", Holder(f"t{i}", "old:1")) for i in range(3)} == {"t0:1", "t1:1", "t2:1"}


def test_a_holder_that_is_not_listed_is_still_asked() -> None:
    """Nobody else could claim the run before the lease ends."""
    assert pick_trainer(trainers("t0"), RUN, "pip", Holder("t9", "t9:1")) == "t9:1"


def test_a_free_run_goes_to_the_same_trainer_from_every_gateway() -> None:
    """The order in which workers are listed does not matter."""
    one, other = trainers("t0", "t1", "t2"), trainers("t2", "t0", "t1")
    assert pick_trainer(one, RUN, "pip", None) == pick_trainer(other, RUN, "pip", None)


def test_no_trainer_of_the_base_is_a_retryable_error() -> None:
    """Another base's trainer does not help."""
    with pytest.raises(UnavailableError, match="no trainer of the base 'llama'") as caught:
        pick_trainer(trainers("t0"), RUN, "llama", None)
    assert (caught.value.reason, caught.value.retry_after_seconds) == ("NO_WORKER", 1.0)


def test_a_draining_trainer_gets_no_free_run() -> None:
    """It would hand the run on at once."""
    table = WorkerTable().refreshed([WorkerView("t0", "trainer", "pip", "t0:1", draining=True)])
    with pytest.raises(UnavailableError):
        pick_trainer(table, RUN, "pip", None)


def loaded(*loads: float) -> list[WorkerView]:
    return [WorkerView(f"t{n}", "trainer", "pip", f"t{n}:1", load=load) for n, load in enumerate(loads)]


def test_a_free_run_goes_to_a_trainer_with_little_to_do() -> None:
    """Hashing decides among those whose load is near the mean or below it."""
    runs = [f"tenants/acme/runs/r-{number}" for number in range(50)]
    assert {place(run, loaded(1.0, 0.0, 1.0)).worker for run in runs} == {"t1"}
    assert {place(run, loaded(5.0, 5.2, 20.0)).worker for run in runs} == {"t0", "t1"}
    assert {place(run, loaded(0.0, 0.05, 0.0)).worker for run in runs} == {"t0", "t1", "t2"}


def test_a_trainer_whose_memory_is_in_use_gets_a_run_only_if_all_are_so() -> None:
    """It would have to go beyond its budget."""
    full = WorkerView("t0", "trainer", "pip", "t0:1", full=True)
    free = WorkerView("t1", "trainer", "pip", "t1:1", load=3.0)
    assert place(RUN, [full, free]) == free
    assert place(RUN, [full]) == full


_LOADS = st.lists(st.floats(0.0, 100.0), min_size=1, max_size=8)


@given(_LOADS, st.text(max_size=8))
def test_the_trainer_of_a_free_run_is_near_the_mean_or_below(loads: list[float], run: str) -> None:
    """Whatever the loads are, there is one, and the order of the list does not matter."""
    trainers = loaded(*loads)
    chosen = place(run, trainers)
    assert chosen.load <= 1.25 * sum(loads) / len(loads) + 0.1 + 1e-9
    assert place(run, trainers[::-1]) == chosen


@given(st.integers(1, 8), st.integers(1, 100))
def test_runs_that_come_one_after_the_other_are_spread_within_the_bound(num_trainers: int, num_runs: int) -> None:
    """Each counts before the next is placed, as one that queues ahead."""
    loads = dict.fromkeys((f"t{number}" for number in range(num_trainers)), 0.0)
    for number in range(num_runs):
        loads[place(f"run-{number}", loaded(*loads.values())).worker] += 1.0
    assert max(loads.values()) <= 1.25 * num_runs / num_trainers + 1.1


@given(st.integers(2, 8), st.data())
def test_a_trainer_that_comes_or_goes_moves_only_its_own_runs(count: int, data: st.DataObject) -> None:
    """Among even loads the place of a run changes only if the trainer was its place, or becomes it."""
    trainers = loaded(*[1.0] * count)
    other = data.draw(st.sampled_from(trainers))
    rest = [trainer for trainer in trainers if trainer != other]
    runs = [f"run-{number}" for number in range(100)]
    moved = [run for run in runs if place(run, trainers) != place(run, rest)]
    assert moved == [run for run in runs if place(run, trainers) == other]


def test_a_base_stays_known_when_its_last_trainer_goes() -> None:
    """So that CreateRun does not call it unknown during a restart."""
    assert trainers("t0").refreshed([]).bases("trainer") == ["pip"]


@given(st.lists(st.text(min_size=1, max_size=6), min_size=2, max_size=8, unique=True), st.data())
def test_losing_a_worker_moves_only_its_own_keys(names: list[str], data: st.DataObject) -> None:
    """Rendezvous hashing: the others keep what they have cached."""
    table = trainers(*names)
    gone = data.draw(st.sampled_from(names))
    rest = table.without(frozenset({f"{gone}:1"}))
    for key in map(str, range(20)):
        before = rank(key, table.workers)[0]
        if before.worker != gone:
            assert rank(key, rest.workers)[0] == before


def test_a_revision_stays_with_the_sampler_that_has_it() -> None:
    """Small differences in load do not move it."""
    revision = f"{RUN}/revisions/a"
    home = pick_sampler(samplers(a=0, b=0, c=0), "pip", revision, {})
    assert pick_sampler(samplers(a=3, b=2, c=1), "pip", revision, {}) == home


def test_a_revision_leaves_an_overloaded_sampler() -> None:
    """A hot adapter may use several samplers."""
    revision = f"{RUN}/revisions/a"
    home = pick_sampler(samplers(a=0, b=0), "pip", revision, {})
    assert pick_sampler(samplers(a=0, b=0), "pip", revision, {home: 50}) != home


def test_a_sampler_that_comes_or_goes_moves_only_its_own_adapters() -> None:
    """The others keep what they have cached; the work is shared by all."""
    revisions = [f"tenants/acme/runs/r-{number}/revisions/a" for number in range(300)]
    three, two = samplers(a=0, b=0, c=0), samplers(a=0, b=0)
    before = {name: pick_sampler(three, "pip", name, {}) for name in revisions}
    after = {name: pick_sampler(two, "pip", name, {}) for name in revisions}
    assert all(after[name] == before[name] for name in revisions if before[name] != "c:1")
    assert min(Counter(before.values()).values()) > 70


def test_a_hot_adapter_spills_over_to_the_same_second_sampler_and_comes_back() -> None:
    """Only what is too much goes on, always to the next in the run's own order, whose cache then has it as well."""
    revision = f"{RUN}/revisions/a"
    home, second, third = (f"{worker.worker}:1" for worker in rank(RUN, samplers(a=0, b=0, c=0).workers))
    in_flight = Counter[str]()
    for _ in range(60):
        in_flight[pick_sampler(samplers(a=0, b=0, c=0), "pip", revision, in_flight)] += 1
    assert in_flight[home] >= in_flight[second] >= in_flight[third] > 0
    busy = {home: 9, second: 8, third: 0}
    assert pick_sampler(samplers(a=0, b=0, c=0), "pip", revision, busy) == second
    assert pick_sampler(samplers(a=0, b=0, c=0), "pip", revision, {home: 8}) == home


def test_a_bare_base_goes_to_the_idlest_sampler() -> None:
    """Calls that this gateway has open count too: the workers' reports are a second old."""
    table = samplers(a=2, b=1, c=4)
    assert pick_sampler(table, "pip", "", {}) == "b:1"
    assert pick_sampler(table, "pip", "", {"b:1": 9}) == "a:1"
