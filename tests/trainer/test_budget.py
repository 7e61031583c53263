"""What passes cost and how much one may hold: arithmetic, and the probe on a real base."""

from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from tests.trainer.harness import trainer_settings
from treadle_engine import bases
from treadle_engine.base_model import BaseModel
from treadle_engine.passes import CHUNK_TOKENS
from treadle_trainer import probe
from treadle_trainer.budget import DEFAULT_TOKENS, LEAST_TOKENS, MEMORY_SHARE, Pace, PassCost, choose_budget
from treadle_trainer.memory import host_memory

COST = PassCost(0.01, 2e-4, 1e-7, bytes_per_token=100_000)


def rows(*shapes: tuple[int, int]) -> np.ndarray:
    return np.array([(1.0, count * length, count * length**2) for count, length in shapes])


def test_the_fit_finds_the_coefficients_that_made_the_times() -> None:
    """Fixed cost, cost per token and cost per square are told apart, also with a little noise."""
    shapes_SC = rows((1, 16), (4, 64), (1, 256), (1, 512), (8, 16), (4, 128))
    wanted_C = np.array([0.02, 1e-4, 3e-7])
    np.testing.assert_allclose(probe.fit_cost(shapes_SC, shapes_SC @ wanted_C), wanted_C, rtol=1e-6)
    noise = np.random.default_rng(0).uniform(0.98, 1.02, len(shapes_SC))
    np.testing.assert_allclose(probe.fit_cost(shapes_SC, shapes_SC @ wanted_C * noise), wanted_C, rtol=0.25)


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_no_coefficient_is_negative_however_few_and_noisy_the_passes(count: int) -> None:
    """A pass costs something per token for certain; whatever else noise says stays at or above 0."""
    shapes_SC = rows((1, 16), (4, 64), (1, 256), (1, 512), (8, 16), (4, 128))[:count]
    for seed in range(50):
        took_S = np.random.default_rng(seed).uniform(0.01, 0.2, count)
        cost_C = probe.fit_cost(shapes_SC, took_S)
        assert (cost_C >= 0).all()
        assert cost_C[1] > 0


def test_the_cost_of_sequences_is_the_formula() -> None:
    """b T + c sum(L^2)."""
    assert COST.seconds(np.array([10, 20])) == pytest.approx(2e-4 * 30 + 1e-7 * 500)


def test_the_limit_by_memory_is_a_coarse_power_of_two() -> None:
    """A byte more or less of memory, or of a token, does not change which data are too long."""
    limits = {PassCost(0, 1, 0, size).tokens_that_fit(2**34) for size in range(900_000, 1_000_000, 10_000)}
    assert limits == {4096}
    assert MEMORY_SHARE * 2**34 >= 4096 * 1_000_000
    assert PassCost(0, 1, 0, 10**12).tokens_that_fit(2**30) == LEAST_TOKENS == CHUNK_TOKENS


def test_a_setting_goes_before_what_was_measured() -> None:
    """0 chooses by memory, and a default where nothing was measured."""
    assert choose_budget(3000, 0.25, COST, 2**34).max_tokens == 3000
    assert choose_budget(0, 0.25, COST, 2**34).max_tokens == 32768
    assert choose_budget(0, 0.25, None, 2**34).max_tokens == DEFAULT_TOKENS


def test_a_budget_below_a_chunk_is_refused_by_the_settings() -> None:
    """What the engine could not serve does not start."""
    assert trainer_settings("store:1", max_tokens_per_pass=1024).max_tokens_per_pass == 1024
    for wrong in (1, 64, 1023, -1):
        with pytest.raises(ValidationError, match="max_tokens_per_pass"):
            trainer_settings("store:1", max_tokens_per_pass=wrong)


def test_the_pace_follows_the_passes() -> None:
    """Passes that take twice as long as expected make it 2; a pass that nothing was expected of changes nothing."""
    pace = Pace()
    for _ in range(100):
        pace.learn(0.1, 0.2)
    assert pace.factor == pytest.approx(2.0, abs=0.01)
    pace.learn(0.0, 5.0)
    assert pace.factor == pytest.approx(2.0, abs=0.01)


def test_a_containers_limit_counts_as_the_machines_memory(tmp_path: Path) -> None:
    """Where there is one, and it is less."""
    file = tmp_path / "memory.max"
    whole = host_memory(file)
    assert whole > 2**28
    for text, expected in (("max\n", whole), (f"{2**27}\n", 2**27), (f"{2**60}\n", whole)):
        file.write_text(text)
        assert host_memory(file) == expected


def test_allocations_are_counted_until_they_are_freed() -> None:
    """Views and results written in place are no new memory."""
    counted = probe._CountedAllocations()
    with counted:
        first = torch.zeros(1000)
        first.view(10, 100).add_(1.0)
        second = first + first
        del second
        third = first * 2
        del first, third
    assert counted.peak == 2 * 4000


def test_the_probe_measures_pip_the_same_memory_each_time() -> None:
    """Seconds depend on the machine's mood; bytes per token, which decide what is too long, do not."""
    base = BaseModel.load(str(bases.pip_folder()), dtype="float32")
    first, second = probe.measure(base), probe.measure(base)
    assert first.bytes_per_token == second.bytes_per_token
    # At least what any backward must keep: the inputs of the linears of each layer.
    assert first.bytes_per_token > 4 * base.info.num_layers * 4 * base.info.hidden_size
    assert first.seconds_per_token > 0
