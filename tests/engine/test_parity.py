"""Parity with the outside: fifty steps beside plain PEFT and AdamW, and the RL losses as their papers write them.

The reference side is plain PEFT's logits, one sequence at a time. The papers' losses are written out here as values
and as the factor on each token's gradient of log pi, so that neither side differentiates the other's formula.
"""

# Shape suffix legend
#   T = packed tokens, L = tokens of one sequence

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.engine.builders import make_state
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

STEPS = 50
ADAM = AdamParams(learning_rate=2e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.01)
LENGTHS = [30, 21, 12]


class Reference:
    """A run's adapter in plain PEFT on a float32 base of its own."""

    def __init__(self, folder: Path, base: BaseModel, state: TrainState, adapter: Path) -> None:
        save_adapter(adapter, base, state.weights)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model = peft.PeftModel.from_pretrained(model, str(adapter), is_trainable=True)

    def logprobs_T(self, batch: TokenBatch) -> Tensor:
        """Return the log-probability of every target from full logits."""
        parts = []
        for rows in sequences(batch):
            tokens_L = torch.from_numpy(batch.tokens_T[rows].astype(np.int64))
            targets_L = torch.from_numpy(batch.targets_TK[rows].astype(np.int64))
            logits_LV = self.model(tokens_L[None], use_cache=False).logits[0]
            parts.append(logits_LV.log_softmax(-1).gather(1, targets_L[:, None])[:, 0])
        return torch.cat(parts)

    def tensors(self, state: TrainState) -> dict[str, torch.nn.Parameter]:
        """Return PEFT's parameters by the engine's names."""
        theirs = dict(self.model.named_parameters())
        return {
            name: theirs[f"base_model.model.{name.replace('.weight', '.default.weight')}"]
            for name in state.weights.to_tensors()
        }


def sequences(batch: TokenBatch) -> Iterator[slice]:
    """Yield each sequence's rows."""
    ends = np.cumsum(batch.lengths_R)
    for start, end in zip(ends - batch.lengths_R, ends, strict=True):
        yield slice(int(start), int(end))


def text_batch(seed: int, vocab: int, columns: dict[str, np.ndarray] | None = None) -> TokenBatch:
    """Return sequences that can be learned: each repeats a short phrase of its own."""
    rng = np.random.default_rng(seed)
    rows = [np.resize(rng.integers(3, vocab, 5), length + 1).astype(np.int32) for length in LENGTHS]
    return TokenBatch(
        np.array(LENGTHS, dtype=np.int64),
        np.concatenate([row[:-1] for row in rows]),
        np.concatenate([row[1:] for row in rows]),
        columns or {"weights": np.ones(sum(LENGTHS), dtype=np.float32)},
    )


def distance(state: TrainState, reference: Reference, before: dict[str, Tensor]) -> float:
    """Return the norm of all differences of the weights over the norm of their movement."""
    apart = moved = 0.0
    for name, theirs in reference.tensors(state).items():
        apart += float((state.weights.to_tensors()[name] - theirs.detach()).square().sum())
        moved += float((theirs.detach() - before[name]).square().sum())
    return (apart / moved) ** 0.5


def test_fifty_steps_stay_with_peft_and_adamw(pip: BaseModel, pip_folder: Path, tmp_path: Path) -> None:
    """A run that shares every pass with a neighbour follows, over fifty steps, what PEFT and AdamW do with it alone.

    Measured: losses within 3e-7, weights within 7e-7 of their movement.
    """
    state, neighbour = make_state(pip, rank=8, seed=8), make_state(pip, rank=4, seed=4)
    before = {name: tensor.clone() for name, tensor in state.weights.to_tensors().items()}
    reference = Reference(pip_folder, pip, state, tmp_path)
    optimizer = torch.optim.AdamW(
        [parameter for parameter in reference.model.parameters() if parameter.requires_grad],
        lr=ADAM.learning_rate,
        betas=(ADAM.beta1, ADAM.beta2),
        eps=ADAM.eps,
        weight_decay=ADAM.weight_decay,
    )
    engine, spec = TrainingEngine(pip), LossSpec("cross_entropy")
    losses = []
    for step in range(STEPS):
        # Two batches in turn: the run can learn them, so that fifty steps go somewhere.
        batch = text_batch(step % 2, pip.info.vocab_size)
        other = text_batch(100 + step, pip.info.vocab_size)
        _, result = engine.run_pass([Chunk(neighbour, other, spec), Chunk(state, batch, spec)])
        assert result.error is None
        for each in (neighbour, state):
            optim_step(each, ADAM)
        loss = -reference.logprobs_T(batch).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(result.loss_sum)
        assert result.loss_sum == pytest.approx(float(loss.detach()), rel=1e-5)
    assert losses[-1] < 0.25 * losses[0]
    assert distance(state, reference, before) < 1e-4


@dataclass(frozen=True)
class Paper:
    """A loss from its paper for one sequence: values, and the factor on grad log pi(token), both [L]."""

    values_L: Tensor
    factors_L: Tensor


Formula = Callable[[Tensor, dict[str, Tensor]], Paper]


def importance_sampling(lp_L: Tensor, given: dict[str, Tensor]) -> Paper:
    """Off-policy policy gradient (Degris et al. 2012): -E_q[pi/q A]; grad pi = pi grad log pi."""
    ratio_L = (lp_L - given["logprobs"]).exp()
    return Paper(-ratio_L * given["advantages"], -ratio_L * given["advantages"])


def ppo(lp_L: Tensor, given: dict[str, Tensor]) -> Paper:
    """PPO (Schulman et al. 2017, equation 7) with bounds 0.9 and 1.3; no gradient where the cut is taken."""
    ratio_L, advantage_L = (lp_L - given["logprobs"]).exp(), given["advantages"]
    cut_L = torch.where(advantage_L >= 0, ratio_L > 1.3, ratio_L < 0.9)
    bounded_L = torch.where(cut_L, torch.where(advantage_L >= 0, 1.3, 0.9), ratio_L)
    return Paper(-bounded_L * advantage_L, -(ratio_L * ~cut_L) * advantage_L)


def cispo(lp_L: Tensor, given: dict[str, Tensor]) -> Paper:
    """CISPO (MiniMax-M1, equations 4 and 5): -sg(clip(r)) A log pi: the cut ratio is a constant weight."""
    weight_L = (lp_L - given["logprobs"]).exp().clip(0.9, 1.3)
    return Paper(-weight_L * given["advantages"] * lp_L, -weight_L * given["advantages"])


def dro(lp_L: Tensor, given: dict[str, Tensor]) -> Paper:
    """Direct reward optimisation (Richemond et al. 2024): -(A log pi - beta/2 (log pi/q)^2), beta = 0.1."""
    log_ratio_L = lp_L - given["logprobs"]
    values_L = -(given["advantages"] * lp_L - 0.05 * log_ratio_L**2)
    return Paper(values_L, -(given["advantages"] - 0.1 * log_ratio_L))


def gspo(lp_L: Tensor, given: dict[str, Tensor]) -> Paper:
    """GSPO-token (Zheng et al. 2025, equations 7 and 13-15): the ratio is the sequence's geometric mean."""
    inside_L = given["sequence_ratio_mask"] != 0
    ratio = (lp_L - given["logprobs"])[inside_L].mean().exp()
    advantage_L = given["advantages"]
    cut_L = torch.where(advantage_L >= 0, ratio > 1.3, ratio < 0.9)
    bounded_L = torch.where(cut_L, torch.where(advantage_L >= 0, 1.3, 0.9), ratio)
    return Paper(-bounded_L * advantage_L, -(ratio * ~cut_L) * advantage_L)


_CLIP = {"clip_low_threshold": 0.9, "clip_high_threshold": 1.3}
LOSSES: list[tuple[LossSpec, Formula]] = [
    (LossSpec("importance_sampling"), importance_sampling),
    (LossSpec("ppo", _CLIP), ppo),
    (LossSpec("cispo", _CLIP), cispo),
    (LossSpec("dro", {"beta": 0.1}), dro),
    (LossSpec("gspo", _CLIP), gspo),
]


def policy_batch(reference: Reference, vocab: int) -> TokenBatch:
    """Return sequences sampled, as it were, by an older policy: ratios lie on both sides of both clip bounds."""
    rng = np.random.default_rng(5)
    plain = text_batch(9, vocab)
    now_T = reference.logprobs_T(plain).detach().numpy()
    # A sequence's mean drift decides gspo's ratio; the noise decides the others'.
    drift_T = np.repeat([0.5, -0.4, 0.05], LENGTHS)
    columns = {
        "logprobs": (now_T - drift_T - 0.4 * rng.normal(size=now_T.shape)).astype(np.float32),
        "advantages": rng.normal(size=now_T.shape).astype(np.float32),
        "sequence_ratio_mask": (rng.random(now_T.shape) < 0.8).astype(np.float32),
    }
    return text_batch(9, vocab, columns)


@pytest.mark.parametrize(("spec", "formula"), LOSSES, ids=[spec.name for spec, _ in LOSSES])
def test_rl_losses_are_those_of_their_papers(
    pip: BaseModel, pip_folder: Path, tmp_path: Path, spec: LossSpec, formula: Formula
) -> None:
    """The loss, the log-probs and the gradient of every A and B follow from the paper's formula and PEFT's logits."""
    state = make_state(pip, rank=6)
    reference = Reference(pip_folder, pip, state, tmp_path)
    batch = policy_batch(reference, pip.info.vocab_size)
    lp_T = reference.logprobs_T(batch)
    papers = []
    for rows in sequences(batch):
        given = {name: torch.from_numpy(column[rows]) for name, column in batch.columns.items()}
        papers.append(formula(lp_T.detach()[rows], given))
    factors_T = torch.cat([paper.factors_L for paper in papers])
    if spec.name in ("ppo", "gspo"):
        assert 0.1 < float((factors_T == 0).float().mean()) < 0.9  # both branches are there
    (factors_T * lp_T).sum().backward()
    (result,) = TrainingEngine(pip).run_pass([Chunk(state, batch, spec)])
    assert result.error is None
    torch.testing.assert_close(torch.from_numpy(result.logprobs_TK), lp_T.detach(), rtol=1e-5, atol=1e-5)
    expected_loss = sum(float(paper.values_L.sum()) for paper in papers)
    assert result.loss_sum == pytest.approx(expected_loss, rel=1e-5, abs=1e-4)
    pairs = state.weights.layout.pairs(state.grads)
    for site in state.weights.layout.sites:
        pair = pairs[site.index]
        assert pair is not None
        for letter, ours in zip("AB", pair, strict=True):
            expected = reference.tensors(state)[tensor_name(site, letter)].grad
            assert expected is not None
            apart = float(torch.linalg.vector_norm(ours - expected) / torch.linalg.vector_norm(expected))
            assert apart < 1e-4  # measured: 5e-6
