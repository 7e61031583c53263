"""Which runs move: demands that do not depend on the neighbours, moves that make loads even and come to an end."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treadle_trainer.balance import PROMISED_SECONDS, Expected, Movable, Peer, improves, plan
from treadle_trainer.demand import WINDOW_SECONDS, Demand

GAP = 0.5


def peers(*loads: float) -> list[Peer]:
    return [Peer(f"t{number}", f"t{number}:1", load) for number, load in enumerate(loads, 1)]


def movable(*demands: float) -> list[Movable]:
    return [Movable(f"r{number}", demand) for number, demand in enumerate(demands)]


def of_cycles(used: float, waited: float, away: float, seconds: float) -> float:
    """The demand of a run after so many seconds of the same cycle."""
    demand, now = Demand(0.0), 0.0
    while now < seconds:
        demand.begin(now)
        now += used + waited
        demand.worked(used, now)
        demand.end(now)
        now += away
    return demand.value(now)


@pytest.mark.parametrize("waited", [0.0, 0.05, 2.0])
def test_a_demand_is_what_the_run_would_use_alone(waited: float) -> None:
    """50 ms of work and 150 ms away are a quarter, however long it waits for others."""
    assert of_cycles(0.05, waited, 0.15, 20 * WINDOW_SECONDS) == pytest.approx(0.25, rel=0.05)


def test_who_queues_ahead_wants_a_whole_device_and_who_is_idle_none() -> None:
    """Until something is seen, a run counts as one that queues ahead; what its last trainer knew counts more."""
    demand = Demand(0.0)
    assert demand.value(0.0) == 1.0
    demand.begin(0.0)
    demand.worked(0.01, 10.0)
    assert demand.value(1e6) == 1.0
    demand.end(1e6)
    assert demand.value(1e6 + 10 * WINDOW_SECONDS) < 0.01
    demand.assume(0.3)
    assert demand.value(1e6 + 10 * WINDOW_SECONDS) == pytest.approx(0.3)


def test_runs_move_until_loads_are_even() -> None:
    """Six that queue ahead, and one idle trainer: three move, and no more."""
    moves = plan(6.0, movable(*[1.0] * 6), peers(0.0), GAP, most=10)
    assert [(move.peer.worker, move.load) for move in moves] == [("t1", 6.0), ("t1", 5.0), ("t1", 4.0)]
    assert len(plan(6.0, movable(*[1.0] * 6), peers(0.0), GAP, most=2)) == 2


def test_moves_go_to_whoever_has_least_by_then() -> None:
    """Not all to the one that had least at first."""
    moves = plan(9.0, movable(*[1.0] * 9), peers(1.0, 0.0, 8.0), GAP, most=10)
    assert [move.peer.worker for move in moves] == ["t2", "t1", "t2", "t1", "t2", "t1"][: len(moves)]
    assert len(moves) >= 5


def test_small_differences_move_nothing() -> None:
    """Two and one, or three and two, cannot be more even; a hundred and ninety-five need not."""
    assert plan(2.0, movable(1.0, 1.0), peers(1.0), GAP, 4) == []
    assert plan(3.0, movable(1.0, 1.0, 1.0), peers(2.0), GAP, 4) == []
    assert plan(100.0, movable(*[1.0] * 100), peers(95.0), GAP, 4) == []
    assert plan(0.4, movable(0.2, 0.2), peers(0.0), GAP, 4) == []


def test_a_run_that_is_all_the_load_stays() -> None:
    """Idle ones beside it change nothing: moving them brings nothing either."""
    assert plan(1.0, movable(1.0), peers(0.0), GAP, 4) == []
    assert plan(1.0, movable(1.0, 0.0, 0.001), peers(0.0), GAP, 4) == []


def test_of_equal_runs_the_smaller_state_moves() -> None:
    """It takes less time."""
    runs = [Movable("large", 1.0, 100), Movable("small", 1.0, 10)]
    assert plan(2.0, runs, peers(0.0), GAP, 4)[0].run.run == "small"


def test_what_is_promised_counts_until_it_comes_or_is_late() -> None:
    """So that the same room is not promised twice, and not kept for ever."""
    expected = Expected()
    expected.promise(Movable("a", 0.7, 10), 0.0)
    expected.promise(Movable("b", 0.2, 5), 1.0)
    assert (expected.load(1.0), expected.num_bytes(1.0)) == (pytest.approx(0.9), 15)
    assert expected.arrived("a") == 0.7
    assert expected.arrived("a") is None
    assert expected.load(1.0) == pytest.approx(0.2)
    assert expected.load(1.0 + PROMISED_SECONDS) == 0.0


class Fleet:
    """Trainers that decide at any moment, by lists of any age, with the real functions; moves take any time."""

    def __init__(self, demands: list[list[float]]) -> None:
        names = itertools.count()
        self.runs = [{f"r{next(names)}": demand for demand in own} for own in demands]
        self.expected = [Expected() for _ in demands]
        self.listed = [0.0] * len(demands)
        self.under_way: list[tuple[str, float, int]] = []
        self.moved = 0.0
        self.num_moves = 0

    def load(self, number: int) -> float:
        """What the trainer itself knows."""
        return math.fsum(self.runs[number].values()) + self.expected[number].load(0.0)

    def energy(self) -> float:
        """The sum of the squares of the loads."""
        return math.fsum(self.load(number) ** 2 for number in range(len(self.runs)))

    def report(self, number: int) -> None:
        """A heartbeat."""
        self.listed[number] = self.load(number)

    def look(self, number: int) -> int:
        """Offers what should move; returns how many runs are on their way then."""
        runs = [Movable(run, demand) for run, demand in self.runs[number].items()]
        others = [Peer(str(n), "", load) for n, load in enumerate(self.listed) if n != number]
        accepted = 0
        for move in plan(self.load(number), runs, others, GAP, 4):
            other = int(move.peer.worker)
            before = self.energy()
            if improves(move.load, self.load(other), move.run.demand, GAP):
                self.expected[other].promise(move.run, 0.0)
                del self.runs[number][move.run.run]
                self.under_way.append((move.run.run, move.run.demand, other))
                assert self.energy() <= before - GAP * move.run.demand + 1e-9
                self.moved += move.run.demand
                accepted += 1
        self.num_moves += accepted
        return accepted

    def arrive(self, which: int) -> None:
        """One of the runs under way is there."""
        if self.under_way:
            run, demand, other = self.under_way.pop(which % len(self.under_way))
            assert self.expected[other].arrived(run) == demand
            self.runs[other][run] = demand


_DEMANDS = st.lists(st.lists(st.floats(0.0, 1.0), max_size=12), min_size=2, max_size=5)
_EVENTS = st.lists(st.tuples(st.sampled_from(["report", "look", "arrive"]), st.integers(0, 99)), max_size=60)


@settings(max_examples=200, deadline=None)
@given(_DEMANDS, _EVENTS)
def test_loads_become_even_and_never_swing(demands: list[list[float]], events: list[tuple[str, int]]) -> None:
    """Whenever trainers look, and however old their lists are.

    Each accepted move lowers the sum of squares by its demand times the least difference, so that what moves in all is
    bounded; and once everybody has looked in peace, nothing is left that should move.
    """
    fleet = Fleet(demands)
    bound = fleet.energy() / GAP
    for event, number in events:
        getattr(fleet, event)(number if event == "arrive" else number % len(demands))
    for _ in range(sum(map(len, demands)) + 2):
        while fleet.under_way:
            fleet.arrive(0)
        for number in range(len(demands)):
            fleet.report(number)
        if not sum(fleet.look(number) for number in range(len(demands))):
            break
    assert not fleet.under_way
    assert fleet.moved <= bound + 1e-6
    loads = [fleet.load(number) for number in range(len(demands))]
    most, least = max(range(len(loads)), key=loads.__getitem__), min(loads)
    assert not any(improves(loads[most], least, demand, GAP) for demand in fleet.runs[most].values())


@settings(deadline=None)
@given(st.integers(2, 8), st.integers(1, 60))
def test_runs_that_queue_ahead_end_up_as_even_as_can_be(num_trainers: int, num_runs: int) -> None:
    """All on one trainer, the others new: in the end numbers differ by one, or by a tenth where there are many."""
    fleet = Fleet([[1.0] * num_runs] + [[] for _ in range(num_trainers - 1)])
    for _ in range(num_runs + 1):
        for number in range(num_trainers):
            fleet.report(number)
            fleet.look(number)
            while fleet.under_way:
                fleet.arrive(0)
    counts = [len(runs) for runs in fleet.runs]
    assert max(counts) - min(counts) <= max(1, 0.1 * max(counts))
    assert fleet.num_moves <= num_runs - num_runs // num_trainers + num_trainers
