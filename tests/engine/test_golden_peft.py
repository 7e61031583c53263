"""The engine against plain PEFT and torch.optim.AdamW: same adapter, same data, losses written out by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.engine.builders import make_batch, make_state
from treadle_engine.base_model import BaseModel
from treadle_engine.batch import TokenBatch
from treadle_engine.lora import tensor_name
from treadle_engine.losses import LossSpec
from treadle_engine.optim import AdamParams, TrainState, optim_step
from treadle_engine.passes import Chunk, TrainingEngine
from treadle_engine.peft_format import save_adapter

# PEFT warns of a tied unembedding in the adapter (merging would be lossy), and uses a name that transformers retires.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]

ADAM = AdamParams(learning_rate=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.01)
LENGTHS = [40, 25, 7]


def peft_copy(folder: Path, base: BaseModel, state: TrainState, adapter: Path) -> peft.PeftModel:
    """Load the run's adapter into PEFT on a float32 copy of the base, ready to train."""
    save_adapter(adapter, base, state.weights)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(model, str(adapter), is_trainable=True)


def reference_loss(model: peft.PeftModel, batch: TokenBatch, loss: str) -> Tensor:
    """Return the summed loss of a batch, one sequence after the other, from full logits."""
    total = torch.zeros(())
    ends = np.cumsum(batch.lengths_R)
    for start, end in zip(ends - batch.lengths_R, ends, strict=True):
        tokens = torch.from_numpy(batch.tokens_T[start:end].astype(np.int64))
        targets = torch.from_numpy(batch.targets_TK[start:end].astype(np.int64))
        column = {name: torch.from_numpy(values[start:end]) for name, values in batch.columns.items()}
        logprobs = model(tokens[None], use_cache=False).logits[0].log_softmax(-1)
        lp = logprobs.gather(1, targets.clamp(min=0)[:, None])[:, 0]
        present = (targets >= 0).float()
        if loss == "cross_entropy":
            total = total - (column["weights"] * lp * present).sum()
            continue
        advantage = column["advantages"] * present
        ratio = torch.exp(lp - column["logprobs"])
        if loss == "importance_sampling":
            total = total - (ratio * advantage).sum()
        elif loss == "ppo":
            total = total - torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).sum()
        elif loss == "cispo":
            total = total - (ratio.detach().clamp(0.0, 4.0) * lp * advantage).sum()
        elif loss == "dro":
            total = total - ((lp * advantage - 0.5 * 0.05 * (lp - column["logprobs"]) ** 2) * present).sum()
        elif loss == "gspo":
            inside = (column["sequence_ratio_mask"] != 0).float() * present
            mean = ((lp.detach() - column["logprobs"]) * inside).sum() / inside.sum()
            ratio = torch.exp(mean) * torch.exp(lp - lp.detach())
            total = total - torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).sum()
    return total


def differences(model: peft.PeftModel, state: TrainState, before: dict[str, Tensor]) -> tuple[float, float]:
    """Return the largest difference of any weight, and the norm of all differences over the norm of the movement."""
    theirs = dict(model.named_parameters())
    largest, apart, moved = 0.0, 0.0, 0.0
    for name, ours in state.weights.to_tensors().items():
        expected = theirs[f"base_model.model.{name.replace('.weight', '.default.weight')}"].detach()
        largest = max(largest, float((ours - expected).abs().max()))
        apart += float((ours - expected).square().sum())
        moved += float((expected - before[name]).square().sum())
    return largest, (apart / moved) ** 0.5


def train_both(
    folder: Path, base: BaseModel, adapter: Path, loss: str, steps: int
) -> tuple[list[tuple[float, float]], tuple[float, float]]:
    """Train the same adapter in both; return (our loss, their loss) by step and the final weights' differences."""
    state = make_state(base, rank=8)
    before = {name: tensor.clone() for name, tensor in state.weights.to_tensors().items()}
    model = peft_copy(folder, base, state, adapter)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.01)
    engine = TrainingEngine(base)
    losses = []
    for step in range(steps):
        batch = make_batch(LENGTHS, step, base.info.vocab_size, loss)
        (result,) = engine.run_pass([Chunk(state, batch, LossSpec(loss))])
        assert result.error is None
        optim_step(state, ADAM)
        expected = reference_loss(model, batch, loss)
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
        losses.append((result.loss_sum, float(expected.detach())))
    return losses, differences(model, state, before)


@pytest.mark.parametrize("loss", ["cross_entropy", "importance_sampling", "ppo", "cispo", "dro", "gspo"])
def test_one_step_equals_peft_and_adamw(pip: BaseModel, pip_folder: Path, tmp_path: Path, loss: str) -> None:
    """One step of every loss moves every weight as PEFT's own modules and AdamW do."""
    losses, (largest, relative) = train_both(pip_folder, pip, tmp_path, loss, steps=1)
    # A loss of ratios takes the rounding of a log-prob through exp: two computations agree to some 1e-6.
    assert losses[0][0] == pytest.approx(losses[0][1], rel=1e-6 if loss == "cross_entropy" else 1e-5)
    # Adam divides by the gradient's size, so the few weights whose gradient is all rounding may differ by up to lr.
    assert relative < 1e-3
    assert largest < 1e-3


def test_ten_steps_equal_peft_and_adamw(pip: BaseModel, pip_folder: Path, tmp_path: Path) -> None:
    """Ten cross-entropy steps stay together: losses to 1e-6, weights to a thousandth of their movement."""
    losses, (largest, relative) = train_both(pip_folder, pip, tmp_path, "cross_entropy", steps=10)
    for ours, theirs in losses:
        assert ours == pytest.approx(theirs, rel=1e-6)
    assert relative < 1e-3
    assert largest < 1e-3


@pytest.mark.parametrize("name", ["llama", "llama_tied", "qwen2", "qwen3", "gemma"])
def test_gradients_equal_pefts_on_every_architecture(
    random_folder: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    """One backward on a random model gives PEFT's gradient at every site."""
    folder = random_folder(name)
    base = BaseModel.load(str(folder), dtype="float32")
    state = make_state(base, rank=4)
    model = peft_copy(folder, base, state, tmp_path)
    batch = make_batch(LENGTHS, 3, base.info.vocab_size)
    TrainingEngine(base).run_pass([Chunk(state, batch, LossSpec("cross_entropy"))])
    reference_loss(model, batch, "cross_entropy").backward()
    theirs = dict(model.named_parameters())
    pairs = state.weights.layout.pairs(state.grads)
    for site in state.weights.layout.sites:
        pair = pairs[site.index]
        assert pair is not None
        for letter, ours in zip("AB", pair, strict=True):
            key = f"base_model.model.{tensor_name(site, letter).replace('.weight', '.default.weight')}"
            expected = theirs[key].grad
            assert expected is not None
            torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_soft_targets_equal_full_logits(pip: BaseModel, pip_folder: Path, tmp_path: Path) -> None:
    """K targets per position, with absent ones, give the log-probs and gradient of the dense computation."""
    rng = np.random.default_rng(0)
    plain = make_batch([30, 20], 0, 1024)
    targets = rng.integers(-1, 1024, (50, 5)).astype(np.int32)
    targets[7] = -1
    weights = rng.normal(size=(50, 5)).astype(np.float32)
    batch = TokenBatch(plain.lengths_R, plain.tokens_T, targets, {"weights": weights})
    batch.validate(pip.info, "cross_entropy")
    state = make_state(pip)
    (result,) = TrainingEngine(pip).run_pass([Chunk(state, batch, LossSpec("cross_entropy"))])
    model = peft_copy(pip_folder, pip, state, tmp_path)
    parts = [model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0] for ids in np.split(batch.tokens_T, [30])]
    lp = torch.cat(parts).log_softmax(-1).gather(1, torch.from_numpy(targets.astype(np.int64)).clamp(min=0))
    present = torch.from_numpy(targets >= 0)
    torch.testing.assert_close(torch.from_numpy(result.logprobs_TK), lp.detach() * present, rtol=1e-4, atol=1e-4)
    loss = -(torch.from_numpy(weights) * lp * present).sum()
    assert result.loss_sum == pytest.approx(float(loss.detach()), rel=1e-4)
    loss.backward()
    head = state.weights.layout.pairs(state.grads)[-1]
    assert head is not None
    expected = dict(model.named_parameters())["base_model.model.lm_head.lora_B.default.weight"].grad
    torch.testing.assert_close(head[1], expected, rtol=1e-3, atol=1e-3)
