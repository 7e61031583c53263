"""Promise P1: a chunk's numbers do not depend, in any bit, on what shares its pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.engine.builders import make_batch, make_state
from treadle_engine.base_model import BaseModel
from treadle_engine.determinism import rows_are_invariant
from treadle_engine.lora import AdapterWeights
from treadle_engine.losses import LossSpec
from treadle_engine.optim import AdamParams, TrainState, add_gradients, optim_step
from treadle_engine.passes import Chunk, ChunkResult, TrainingEngine

LOSSES = ("cross_entropy", "importance_sampling", "ppo", "cispo", "dro", "gspo", "stable_reinforce")
BASES = ("pip-float32", "pip-bfloat16", "llama-float32", "llama-bfloat16", "qwen3-float32", "gemma-float32")
QUANTIZED = ("pip-float32-int8", "pip-float32-nf4", "llama-bfloat16-int8", "gemma-float32-nf4")


@pytest.fixture(scope="module", params=BASES + QUANTIZED)
def base(request: pytest.FixtureRequest, pip_folder: Path, random_folder: Callable[[str], Path]) -> BaseModel:
    """Each base in the dtype, and quantized in the way, that its name says."""
    name, dtype, quantize = (*request.param.split("-"), "none")[:3]
    folder = pip_folder if name == "pip" else random_folder(name)
    return BaseModel.load(str(folder), dtype=dtype, quantize=quantize)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Run the test with two threads."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def run(base: BaseModel, chunks: list[Chunk], merged: bool) -> list[ChunkResult]:
    """Compute the chunks in one pass, or each in its own."""
    engine = TrainingEngine(base)
    return engine.run_pass(chunks) if merged else [engine.run_pass([chunk])[0] for chunk in chunks]


def assert_same(first: list[ChunkResult], second: list[ChunkResult]) -> None:
    """Compare results bit by bit."""
    for one, two in zip(first, second, strict=True):
        assert one.error is None
        assert two.error is None
        assert one.loss_sum == two.loss_sum
        assert np.array_equal(one.logprobs_TK, two.logprobs_TK)


def check_merged_equals_lone(base: BaseModel, steps: int, num_runs: int = 6) -> None:
    """Train runs with different losses, ranks and sizes (under 16 rows, over 256), merged and alone: same bits."""
    shapes = [([3], 4), ([37, 12], 8), ([1, 1], 1), ([64, 9, 30], 16), ([15], 2), ([280, 6], 3)][:num_runs]
    states: dict[bool, list[TrainState]] = {}
    results: dict[bool, list[list[ChunkResult]]] = {True: [], False: []}
    for merged in (True, False):
        states[merged] = [make_state(base, rank, seed) for seed, (_, rank) in enumerate(shapes)]
        for step in range(steps):
            chunks = [
                Chunk(state, make_batch(lengths, 10 * step + seed, base.info.vocab_size, loss), LossSpec(loss))
                for seed, (state, (lengths, _), loss) in enumerate(zip(states[merged], shapes, LOSSES, strict=False))
            ]
            # A second chunk of the first run, and a forward-only one between them.
            extra = make_batch([5, 20], 77, base.info.vocab_size)
            chunks += [Chunk(states[merged][1], extra, LossSpec("cross_entropy"), forward_only=True)]
            chunks += [Chunk(states[merged][0], extra, LossSpec("cross_entropy"))]
            results[merged].append(run(base, chunks, merged))
            for state in states[merged]:
                optim_step(state, AdamParams(learning_rate=1e-2, grad_clip_norm=1.0))
    for together, alone in zip(results[True], results[False], strict=True):
        assert_same(together, alone)
    for one, two in zip(states[True], states[False], strict=True):
        assert one.digest() == two.digest()


def test_merged_passes_equal_lone_passes_bit_for_bit(base: BaseModel) -> None:
    """On every base and in both dtypes, two training steps end in the same digests."""
    check_merged_equals_lone(base, steps=2)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_merged_passes_equal_lone_passes_with_two_threads(pip_folder: Path, dtype: str) -> None:
    """A second thread changes nothing about the promise."""
    check_merged_equals_lone(BaseModel.load(str(pip_folder), dtype=dtype), steps=1, num_runs=3)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_company_and_any_order_leave_gradients_alone(pip: BaseModel, data: st.DataObject) -> None:
    """Whatever the neighbours' sizes and the place in the pass, one run's gradient has the same bits."""
    mine_batch = make_batch(data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=3)), 1, 1024)
    neighbours = data.draw(st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=3), max_size=4))
    place = data.draw(st.integers(0, len(neighbours)))
    alone, company = make_state(pip), make_state(pip)
    lone = run(pip, [Chunk(alone, mine_batch, LossSpec("cross_entropy"))], merged=True)
    chunks = [
        Chunk(make_state(pip, rank=3, seed=9), make_batch(lengths, index, 1024), LossSpec("cross_entropy"))
        for index, lengths in enumerate(neighbours)
    ]
    chunks.insert(place, Chunk(company, mine_batch, LossSpec("cross_entropy")))
    shared = run(pip, chunks, merged=True)
    assert_same(lone, [shared[place]])
    assert torch.equal(alone.grads, company.grads)


def test_splitting_over_passes_changes_no_bit(pip: BaseModel) -> None:
    """An op's canonical chunks give the same gradient in one pass and in several."""
    batch = make_batch([400, 300, 500, 200, 450, 100], 3, 1024)
    engine = TrainingEngine(pip)
    pieces = engine.split(batch)
    assert [piece.lengths_R.tolist() for piece in pieces] == [[400, 300], [500, 200], [450, 100]]
    together, apart = make_state(pip), make_state(pip)
    one = engine.run_pass([Chunk(together, piece, LossSpec("cross_entropy")) for piece in pieces])
    two = [engine.run_pass([Chunk(apart, piece, LossSpec("cross_entropy"))])[0] for piece in pieces]
    assert_same(one, two)
    assert torch.equal(together.grads, apart.grads)


def computed_apart(
    engine: TrainingEngine, state: TrainState, pieces: list[Chunk]
) -> tuple[list[ChunkResult], list[Tensor]]:
    """Compute chunks as another trainer would: with the run's weights as they came over the wire, each into zeros."""
    weights = AdapterWeights(engine.base, state.weights.config, state.weights.flat.clone())
    apart = [engine.apart(weights) for _ in pieces]
    results = engine.run_pass(
        [Chunk(own, piece.batch, piece.loss, piece.forward_only) for own, piece in zip(apart, pieces, strict=True)]
    )
    return results, [own.grads for own in apart]


@pytest.mark.parametrize(("loss", "rank"), [("cross_entropy", 5), ("cross_entropy", 8), ("gspo", 5)])
def test_chunks_computed_elsewhere_add_the_same_bits(base: BaseModel, loss: str, rank: int) -> None:
    """On every base, a gradient whose chunks came from several places is that of one place, over two steps.

    Of a rank by whose scale products are rounded, and of one by whose scale they are not.
    """
    home, other = TrainingEngine(base), TrainingEngine(base)
    together, apart = make_state(base, rank), make_state(base, rank)
    for step in range(2):
        batches = [make_batch([n, 30, 3], 10 * step + n, base.info.vocab_size, loss) for n in (300, 2, 150, 60, 17)]
        results = [home.run_pass([Chunk(together, batch, LossSpec(loss))])[0] for batch in batches]
        lent, gradients = computed_apart(other, apart, [Chunk(apart, batch, LossSpec(loss)) for batch in batches[1:4]])
        mixed = home.run_pass([Chunk(apart, batches[0], LossSpec(loss))])
        add_gradients(apart, [gradient.numpy() for gradient in gradients])
        mixed += [*lent, *home.run_pass([Chunk(apart, batches[4], LossSpec(loss))])]
        assert_same(results, mixed)
        assert torch.equal(together.grads.view(torch.int32), apart.grads.view(torch.int32))
        for state in (together, apart):
            optim_step(state, AdamParams(learning_rate=1e-2, grad_clip_norm=1.0))
    assert together.digest() == apart.digest()


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_split_over_two_engines_gives_the_same_bits(pip: BaseModel, data: st.DataObject) -> None:
    """Whichever chunks of a batch go elsewhere, in whichever passes, outputs and gradient are those of one engine."""
    lengths = data.draw(st.lists(st.integers(1, 700), min_size=2, max_size=8))
    batch = make_batch(lengths, 5, 1024)
    home, other = TrainingEngine(pip), TrainingEngine(pip)
    spec = LossSpec("cross_entropy")
    pieces = home.split(batch)
    together, mixed = make_state(pip, rank=3), make_state(pip, rank=3)
    expected = home.run_pass([Chunk(together, piece, spec) for piece in pieces])
    elsewhere = [index for index in range(len(pieces)) if data.draw(st.booleans())]
    results, gradients = computed_apart(other, mixed, [Chunk(mixed, pieces[index], spec) for index in elsewhere])
    found = dict(zip(elsewhere, zip(results, gradients, strict=True), strict=True))
    outputs = []
    for index, piece in enumerate(pieces):
        if index in found:
            outputs.append(found[index][0])
            add_gradients(mixed, [found[index][1].numpy()])
        else:
            outputs += home.run_pass([Chunk(mixed, piece, spec)])
    assert_same(expected, outputs)
    assert torch.equal(together.grads.view(torch.int32), mixed.grads.view(torch.int32))


def test_forward_gives_the_logprobs_of_forward_backward(pip: BaseModel) -> None:
    """A forward-only chunk returns the same bits and leaves no gradient."""
    batch = make_batch([30, 17], 5, 1024)
    state = make_state(pip)
    engine = TrainingEngine(pip)
    ahead = engine.run_pass([Chunk(state, batch, LossSpec("cross_entropy"), forward_only=True)])
    assert not state.grads.any()
    assert_same(ahead, engine.run_pass([Chunk(state, batch, LossSpec("cross_entropy"))]))
    assert state.grads.any()


def test_this_machine_multiplies_rows_independently(base: BaseModel) -> None:
    """The start-up probe agrees with the promise on this machine."""
    assert rows_are_invariant(base)


def test_a_poisoned_chunk_fails_alone(pip: BaseModel) -> None:
    """A run with broken weights gets an error; its neighbours' numbers keep their bits."""
    lone, company, poisoned = make_state(pip), make_state(pip), make_state(pip, seed=5)
    poisoned.weights.flat[100] = float("nan")
    spec = LossSpec("cross_entropy")
    batch = make_batch([20, 9], 1, 1024)
    engine = TrainingEngine(pip)
    expected = engine.run_pass([Chunk(lone, batch, spec)])
    results = engine.run_pass([Chunk(poisoned, batch, spec), Chunk(company, batch, spec), Chunk(poisoned, batch, spec)])
    assert results[0].error is not None
    assert results[0].error.reason == "NAN_GRADIENT"
    assert results[2].error is not None
    assert_same(expected, [results[1]])
    assert torch.equal(lone.grads, company.grads)


def test_an_overflowing_loss_adds_nothing(pip: BaseModel) -> None:
    """A ratio that overflows is an error of its chunk; an earlier good chunk of the same run keeps its gradient."""
    state, clean = make_state(pip), make_state(pip)
    good, bad = make_batch([20], 1, 1024, "ppo"), make_batch([9], 2, 1024, "importance_sampling")
    bad.columns["logprobs"][:] = -1e4
    engine = TrainingEngine(pip)
    engine.run_pass([Chunk(clean, good, LossSpec("ppo"))])
    results = engine.run_pass([Chunk(state, good, LossSpec("ppo")), Chunk(state, bad, LossSpec("importance_sampling"))])
    assert results[0].error is None
    assert results[1].error is not None
    assert results[1].error.reason == "NAN_GRADIENT"
    assert torch.equal(state.grads, clean.grads)
