"""Which samples make up each step, and how large steps and learning rates are chosen."""

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treadle.recipes import batches


@given(size=st.integers(1, 40), batch=st.integers(1, 9), epochs=st.integers(1, 3), seed=st.integers(0, 5))
def test_epochs_show_every_sample_equally_often(size: int, batch: int, epochs: int, seed: int) -> None:
    """To within the one step that rounding takes or gives; the same seed gives the same order."""
    made = batches.batches_of(size, batch, epochs=epochs, steps=None, seed=seed)
    assert all(len(step) == batch for step in made)
    assert abs(len(made) * batch - size * epochs) < max(batch, 2)
    seen = Counter(index for step in made for index in step)
    assert max(seen.values()) - min(seen[index] for index in range(size)) <= 1
    assert made == batches.batches_of(size, batch, epochs=epochs, steps=None, seed=seed)


@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=30), seed=st.integers(0, 5))
def test_packed_steps_hold_whole_epochs_within_their_tokens(lengths: list[int], seed: int) -> None:
    """No step is over its tokens, no sample is left out, and steps are closed only for what does not fit."""
    made = batches.packed_batches(lengths, 60, epochs=2, steps=None, seed=seed)
    assert all(sum(lengths[index] for index in step) <= 60 for step in made)
    assert Counter(index for step in made for index in step) == dict.fromkeys(range(len(lengths)), 2)
    for step, after in itertools.pairwise(made):
        assert sum(lengths[index] for index in step) + lengths[after[0]] > 60
    assert len(batches.packed_batches(lengths, 60, epochs=1, steps=5, seed=seed)) == 5


def test_a_step_fits_the_trainer_and_an_epoch_has_steps() -> None:
    """Powers of two: at most 32 samples, at most the budget's tokens, at least eight steps an epoch."""
    assert batches.choose_batch_size([100] * 5000, 100_000) == 32
    assert batches.choose_batch_size([100] * 5000, 1000) == 8
    assert batches.choose_batch_size([100] * 90, 100_000) == 8
    assert batches.choose_batch_size([100] * 3, 10) == 1
    assert batches.choose_pack([100] * 5000, 2048) == 2048
    assert batches.choose_pack([100] * 16, 2048) == 200
    assert batches.choose_pack([100, 900], 2048) == 900


def test_learning_rates_by_size_and_by_step() -> None:
    """The two bases that come with Treadle get what is known to work on them."""
    assert batches.choose_learning_rate(134_515_008) == 1e-3
    assert batches.choose_learning_rate(869_760) == 6e-3
    assert batches.choose_learning_rate(8 * 10**9) == pytest.approx(2.3e-4, abs=1e-5)
    assert batches.choose_learning_rate(10**12) == 1e-4
    for schedule, last in (("linear", 0.1), ("cosine", 0.1), ("constant", 1.0)):
        rates = [batches.learning_rate_at(step, 12, 1.0, schedule, 2) for step in range(12)]
        assert rates[:3] == [0.5, 1.0, 1.0]
        assert rates[-1] == pytest.approx(last)
        assert rates[2:] == sorted(rates[2:], reverse=True)


def test_what_is_held_out_depends_on_the_seed_alone() -> None:
    """At least one sample, never all of them."""
    assert batches.held_out_of(100, 0.05, 1) == batches.held_out_of(100, 0.05, 1)
    assert len(batches.held_out_of(100, 0.05, 1)) == 5
    assert batches.held_out_of(100, 0.0, 1) == []
    assert len(batches.held_out_of(2, 0.9, 1)) == 1
    assert batches.held_out_of(1, 0.9, 1) == []
