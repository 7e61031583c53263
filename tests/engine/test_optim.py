"""AdamW over the flat buffer, and the state that survives a restart."""

from __future__ import annotations

import pytest
import torch

from tests.engine.builders import make_batch, make_state
from treadle_engine.base_model import BaseModel
from treadle_engine.errors import EngineError
from treadle_engine.losses import LossSpec
from treadle_engine.optim import AdamParams, TrainState, optim_step, restore, state_tensors
from treadle_engine.passes import Chunk, TrainingEngine

PARAMS = AdamParams(learning_rate=1e-2, weight_decay=0.1, grad_clip_norm=1.0)


def give_gradient(state: TrainState, seed: int) -> None:
    """Fill the gradient with noise of norm far above the clip."""
    state.grads.copy_(torch.randn(state.grads.shape, generator=torch.Generator().manual_seed(seed)))


def test_steps_equal_torch_adamw_with_clipping(pip: BaseModel) -> None:
    """Five clipped steps end in the weights of clip_grad_norm_ and torch.optim.AdamW."""
    state = make_state(pip)
    reference = torch.nn.Parameter(state.weights.flat.clone())
    optimizer = torch.optim.AdamW([reference], lr=1e-2, betas=(0.9, 0.95), eps=1e-12, weight_decay=0.1)
    for step in range(5):
        give_gradient(state, step)
        reference.grad = state.grads.clone()
        norm = torch.nn.utils.clip_grad_norm_([reference], 1.0)
        optimizer.step()
        metrics = optim_step(state, PARAMS)
        assert metrics["grad_norm:mean"] == pytest.approx(float(norm))
        assert metrics["clip_fraction:mean"] == 1.0
        assert not state.grads.any()
    assert state.step == 5
    torch.testing.assert_close(state.weights.flat, reference.detach(), rtol=1e-6, atol=1e-7)


def test_a_nan_gradient_changes_nothing_but_itself(pip: BaseModel) -> None:
    """The step fails, the gradient is dropped, and the next step is as if nothing had been."""
    state = make_state(pip)
    before = state.digest()
    state.grads[3] = float("nan")
    with pytest.raises(EngineError) as caught:
        optim_step(state, PARAMS)
    assert caught.value.reason == "NAN_GRADIENT"
    assert state.digest() == before
    assert not state.grads.any()


def test_a_restored_state_goes_on_with_the_same_bits(pip: BaseModel) -> None:
    """Snapshot, restore, train on: digests agree with the run that was never interrupted."""
    state, engine = make_state(pip), TrainingEngine(pip)

    def step(target: TrainState, seed: int) -> None:
        engine.run_pass([Chunk(target, make_batch([20, 9], seed, 1024), LossSpec("cross_entropy"))])
        optim_step(target, PARAMS)

    step(state, 0)
    copy = restore(pip, state.weights.config, state_tensors(state))
    assert copy.digest() == state.digest()
    for target in (state, copy):
        step(target, 1)
    assert copy.digest() == state.digest()
    assert copy.weights.digest() == state.weights.digest()


def test_a_snapshot_of_another_shape_is_refused(pip: BaseModel) -> None:
    """Rank 4 does not restore into rank 8."""
    state = make_state(pip, rank=4)
    with pytest.raises(EngineError) as caught:
        restore(pip, make_state(pip, rank=8).weights.config, state_tensors(state))
    assert caught.value.reason == "INCOMPATIBLE_ADAPTER"


@pytest.mark.parametrize("field", [{"learning_rate": -1.0}, {"learning_rate": float("inf")}, {"beta2": 1.0}])
def test_meaningless_settings_are_refused(field: dict[str, float]) -> None:
    """Adam parameters are checked when they are made."""
    with pytest.raises(EngineError) as caught:
        AdamParams(**field)
    assert caught.value.reason == "BAD_VALUE"
