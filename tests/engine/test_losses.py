"""Losses as functions of log-probabilities, and what a loss specification refuses."""

from __future__ import annotations

import math

import pytest
import torch

from treadle_engine.errors import EngineError
from treadle_engine.losses import LossSpec, evaluate


def columns(n: int = 6) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return log-probs and RL columns with ratios on both sides of the clip bounds."""
    generator = torch.Generator().manual_seed(0)
    logprobs = -torch.rand(n, generator=generator) * 3
    return logprobs, {
        "logprobs": logprobs + torch.linspace(-1, 1, n),
        "advantages": torch.tensor([1.0, -1.0] * (n // 2)),
    }


def test_cross_entropy_takes_any_weight() -> None:
    """Negative weights and weights above one are plain factors: the gradient is minus the weight."""
    weights = torch.tensor([-2.5, 0.0, 7.0])
    result = evaluate(LossSpec("cross_entropy"), torch.tensor([-1.0, -2.0, -3.0]), {"weights": weights})
    assert result.values.tolist() == [-2.5, 0.0, 21.0]
    assert torch.equal(result.gradient, -weights)


def test_on_policy_ratio_losses_share_the_policy_gradient() -> None:
    """Where trainer and sampler agree, IS, PPO, CISPO and DRO all have gradient -advantage."""
    logprobs, given = columns()
    given["logprobs"] = logprobs.clone()
    for name in ("importance_sampling", "ppo", "cispo", "dro", "stable_reinforce"):
        torch.testing.assert_close(evaluate(LossSpec(name), logprobs, given).gradient, -given["advantages"])


def test_ppo_bounds_are_ratios_not_distances() -> None:
    """A positive advantage gets no gradient above the upper ratio; per-token bounds win over the configured ones."""
    logprobs = torch.tensor([0.0, 0.0])
    given = {"logprobs": torch.tensor([-0.5, -0.1]), "advantages": torch.ones(2)}  # ratios 1.65 and 1.11
    assert evaluate(LossSpec("ppo"), logprobs, given).gradient[0] == 0
    assert evaluate(LossSpec("ppo"), logprobs, given).gradient[1] < 0
    wide = LossSpec("ppo", {"clip_high_threshold": 2.0})
    assert evaluate(wide, logprobs, given).gradient[0] < 0
    given["clip_high_threshold"] = torch.tensor([1.2, 1.05])
    assert evaluate(wide, logprobs, given).gradient.tolist() == [0.0, 0.0]


def test_cispo_keeps_a_gradient_where_ppo_has_none() -> None:
    """A clipped ratio still weighs the log-prob's gradient."""
    given = {"logprobs": torch.tensor([-3.0]), "advantages": torch.ones(1)}
    result = evaluate(LossSpec("cispo"), torch.tensor([0.0]), given)
    assert result.gradient.item() == -4.0


def test_gspo_uses_one_ratio_per_sequence() -> None:
    """Every position of a sequence has the ratio of the masked mean; sequences do not mix."""
    logprobs, given = columns()
    given["sequence_ratio_mask"] = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 1.0])
    given["advantages"] = torch.ones(6)
    sequence = torch.tensor([0, 0, 0, 1, 1, 1])
    spec = LossSpec("gspo", {"clip_low_threshold": 0.0, "clip_high_threshold": 100.0})
    values = evaluate(spec, logprobs, given, sequence).values
    distance = logprobs - given["logprobs"]
    expected = torch.stack([distance[:2].mean(), distance[3:].mean()]).exp()
    torch.testing.assert_close(-values, expected[sequence])


def test_stable_reinforce_is_its_formula() -> None:
    """Truncated weights and the k2 penalty where tokens were sampled, written out in float64."""
    logprobs, given = columns()
    spec = LossSpec("stable_reinforce", {"kl_coeff": 0.3, "clip_high_threshold": 1.5})
    for mask in (None, torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 1.0])):
        chosen = given if mask is None else given | {"sequence_ratio_mask": mask}
        result = evaluate(spec, logprobs, chosen)
        for n in range(6):
            d = float(logprobs[n].double() - given["logprobs"][n].double())
            a, inside = float(given["advantages"][n]), 1.0 if mask is None else float(mask[n])
            weight = min(math.exp(d), 1.5)
            assert result.values[n].item() == pytest.approx(
                -weight * a * float(logprobs[n]) + 0.15 * inside * d * d, rel=1e-5
            )
            assert result.gradient[n].item() == pytest.approx(-weight * a + 0.3 * inside * d, rel=1e-5)


def test_stable_reinforce_holds_no_distance_where_the_sampler_said_nothing() -> None:
    """Padding of a prompt costs nothing, whatever its log-prob is."""
    given = {"logprobs": torch.zeros(2), "advantages": torch.tensor([0.0, 1.0])}
    result = evaluate(LossSpec("stable_reinforce", {"kl_coeff": 1.0}), torch.tensor([-30.0, 0.0]), given)
    assert result.gradient.tolist() == [0.0, -1.0]


@pytest.mark.parametrize(
    ("name", "config", "reason"),
    [
        ("mse", {}, "UNKNOWN_LOSS"),
        ("ppo", {"epsilon": 0.2}, "BAD_VALUE"),
        ("dro", {"beta": float("nan")}, "BAD_VALUE"),
        ("cross_entropy", {"clip_low_threshold": 0.5}, "BAD_VALUE"),
    ],
)
def test_a_wrong_specification_is_refused(name: str, config: dict[str, float], reason: str) -> None:
    """No name or setting is silently ignored."""
    with pytest.raises(EngineError) as caught:
        LossSpec(name, config)
    assert caught.value.reason == reason
