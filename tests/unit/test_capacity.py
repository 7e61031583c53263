"""The capacity model against a simulation of the trainer's real scheduler."""

import pytest
from click.testing import CliRunner

from bench.simulation import simulate
from treadle.capacity import Speed, Usage, adapter_parameters, memory_of, steady_state, trainers_needed
from treadle.cli.plan import plan

SPEED = Speed(fixed_seconds=0.005, seconds_per_token=1e-4)
# A user whose step is a third of a round trip, one with long steps, one with own work, one who queues ahead.
USAGES = (
    Usage(tokens_per_step=512, round_trip_seconds=0.1),
    Usage(tokens_per_step=2048, round_trip_seconds=0.1),
    Usage(tokens_per_step=512, round_trip_seconds=0.1, own_seconds=0.5),
    Usage(tokens_per_step=512, round_trip_seconds=0.1, window=4),
    Usage(tokens_per_step=16, round_trip_seconds=0.1, window=4),
)


@pytest.mark.parametrize("usage", USAGES, ids=["short", "long", "own work", "ahead", "a little ahead"])
@pytest.mark.parametrize("num_users", [1, 2, 4, 8, 16])
def test_formulas_agree_with_the_scheduler(usage: Usage, num_users: int) -> None:
    """Within 0.1 of the utilisation and a tenth of the throughput, from one user to a full trainer."""
    seen = simulate(SPEED, usage, [0] * num_users, 30.0, 1)
    expected = steady_state(SPEED, usage, num_users)
    assert expected.utilisation == pytest.approx(seen.utilisation, abs=0.1)
    assert expected.steps_per_second == pytest.approx(seen.steps_per_second, rel=0.1)


def test_the_gaps_of_one_are_filled_by_the_others() -> None:
    """One user who waits leaves a trainer idle; the same by queueing ahead, or eight who wait, do not."""
    waits, ahead = USAGES[0], USAGES[3]
    assert simulate(SPEED, waits, [0], 30.0, 1).utilisation < 0.4
    assert simulate(SPEED, ahead, [0], 30.0, 1).utilisation > 0.95
    together = simulate(SPEED, waits, [0] * 8, 30.0, 1)
    assert together.utilisation > 0.95
    assert together.runs_per_pass > 2


def test_nobody_is_starved_in_a_crowd() -> None:
    """Of a thousand users on a hundred trainers, nobody gets less than half of what the others on its trainer get."""
    places = [number % 100 for number in range(1000)]
    seen = simulate(SPEED, USAGES[0], places, 10.0, 100)
    assert seen.least_steps > 0.5 * seen.steps_per_second * 10.0 / 1000


def test_a_simulation_is_the_same_every_time() -> None:
    """No clock and no chance."""
    assert simulate(SPEED, USAGES[0], [0, 0, 1], 5.0, 2) == simulate(SPEED, USAGES[0], [0, 0, 1], 5.0, 2)


def test_as_many_trainers_as_are_needed() -> None:
    """Steps on so many are as fast as asked for, and on one fewer are not."""
    needed = trainers_needed(SPEED, USAGES[0], 1000, slowdown=1.5)
    alone = steady_state(SPEED, USAGES[0], 1).seconds_per_step
    assert steady_state(SPEED, USAGES[0], 1000 / needed).seconds_per_step <= 1.5 * alone
    assert steady_state(SPEED, USAGES[0], 1000 / (needed - 1)).seconds_per_step > 1.5 * alone


def test_memory_is_that_of_the_state() -> None:
    """Weights and two moments in float32, and a gradient while the run works; an 8B base's rank-32 adapter."""
    memory = memory_of(8_000_000_000, 2.0, 1_000_000)
    assert (memory.idle_run_bytes, memory.resident_run_bytes, memory.base_bytes) == (12_000_000, 16_000_000, 16 * 10**9)
    # Qwen3-8B: 36 layers of width 4096 have 87 million parameters at rank 32 in all linears.
    assert 50e6 < adapter_parameters(8_000_000_000, 32) < 120e6


def test_plan_prints_what_was_asked_for() -> None:
    """Without a deployment, when speed and base are given."""
    given = ["--users", "1000", "--fixed-ms", "10", "--tokens-per-second", "20000", "--base-parameters", "8e9"]
    done = CliRunner().invoke(plan, [*given, "--price-per-hour", "2"])
    assert done.exit_code == 0, done.output
    for line in ("trainers:", "idle share:", "price per million tokens:", "idle run, MiB in host memory:"):
        assert line in done.output
    assert CliRunner().invoke(plan, ["--address", "127.0.0.1:1", "--key", "k"]).exit_code == 1
