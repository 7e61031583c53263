"""Training losses as pure functions of log-probabilities, in float32: plain sums over tokens, as in Tinker.

A loss sees only the log-probs of positions that have a target, and its columns at those positions. It knows
neither the model nor the batch's layout, except that `gspo` is told which sequence each position belongs to.
"""

# Shape suffix legend
#   N = positions with a target ([N] or [N, K] alike), S = sequences

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from treadle_engine.batch import REQUIRED
from treadle_engine.errors import EngineError

Columns = Mapping[str, Tensor]

_CLIP = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
DEFAULTS: Mapping[str, Mapping[str, float]] = {
    "cross_entropy": {},
    "importance_sampling": {},
    "ppo": _CLIP,
    # One-sided: only large ratios are cut.
    "cispo": {"clip_low_threshold": 0.0, "clip_high_threshold": 4.0},
    "dro": {"beta": 0.05},
    "gspo": _CLIP,
    "stable_reinforce": {"clip_high_threshold": 2.0, "kl_coeff": 0.0},
}
"""Configuration keys of each loss, with the value used when none is given."""


@dataclass(frozen=True)
class LossSpec:
    """A loss by name with its configuration; unknown names, keys and values are refused at construction."""

    name: str
    config: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the name and every key of the configuration."""
        if self.name not in REQUIRED:
            raise EngineError("UNKNOWN_LOSS", f"unknown loss {self.name!r}; known: {', '.join(REQUIRED)}")
        for key, value in self.config.items():
            if key not in DEFAULTS[self.name]:
                raise EngineError(
                    "BAD_VALUE", f"{self.name} has no setting {key!r}; it has {list(DEFAULTS[self.name])}"
                )
            if not math.isfinite(value):
                raise EngineError("BAD_VALUE", f"{self.name}: {key} must be finite, got {value}")

    @property
    def elementwise(self) -> bool:
        """Tell whether a position's loss depends on that position alone."""
        return self.name != "gspo"

    def setting(self, key: str) -> float:
        """Return a configured value or its default."""
        return float(self.config.get(key, DEFAULTS[self.name][key]))


@dataclass(frozen=True)
class LossResult:
    """Per-position loss and its derivative by the log-prob, both float32 in the log-prob's shape."""

    values: Tensor
    gradient: Tensor


def evaluate(spec: LossSpec, logprobs: Tensor, columns: Columns, sequence_N: Tensor | None = None) -> LossResult:
    """Return the loss at each position and dLoss/dlogprob; `sequence_N` (int64) is needed by gspo alone."""
    leaf = logprobs.detach().requires_grad_()
    with torch.enable_grad():
        values = _LOSSES[spec.name](spec, leaf, columns, sequence_N)
        (gradient,) = torch.autograd.grad(values.sum(), leaf)
    return LossResult(values.detach(), gradient)


def _cross_entropy(spec: LossSpec, logprobs: Tensor, columns: Columns, sequence_N: Tensor | None) -> Tensor:
    return -columns["weights"] * logprobs


def _importance_sampling(spec: LossSpec, logprobs: Tensor, columns: Columns, sequence_N: Tensor | None) -> Tensor:
    return -torch.exp(logprobs - columns["logprobs"]) * columns["advantages"]


def _ppo(spec: LossSpec, logprobs: Tensor, columns: Columns, sequence_N: Tensor | None) -> Tensor:
    return _clipped(spec, torch.exp(logprobs - columns["logprobs"]), columns)


def _cispo(spec: LossSpec, logprobs: Tensor, columns: Columns, sequence_N: Tensor | None) -> Tensor:
    ratio = torch.exp(logprobs.detach() - columns["logprobs"])
    return -_clamp(spec, ratio, columns) * logprobs * columns["advantages"]


def _dro(spec: LossSpec, logprobs: Tensor, columns: Columns, sequence_N: Tensor | None) -> Tensor:
    distance = logprobs - columns["logprobs"]
    return -(logprobs * columns["advantages"] - 0.5 * spec.setting("beta") * distance.square())


def _gspo(spec: LossSpec, logprobs: Tensor, columns: Columns, sequence_N: Tensor | None) -> Tensor:
    if sequence_N is None:
        raise RuntimeError("gspo needs the sequence of every position")
    inside_N = (columns["sequence_ratio_mask"] != 0).float()
    fixed_N = logprobs.detach()
    num_sequences = int(sequence_N[-1]) + 1 if sequence_N.numel() else 0
    zeros_S = torch.zeros(num_sequences, dtype=torch.float32, device=logprobs.device)
    distance_S = zeros_S.index_add(0, sequence_N, (fixed_N - columns["logprobs"]) * inside_N)
    count_S = zeros_S.index_add(0, sequence_N, inside_N).clamp_(min=1.0)
    ratio_N = torch.exp(distance_S / count_S)[sequence_N] * torch.exp(logprobs - fixed_N)
    return _clipped(spec, ratio_N, columns)


def _stable_reinforce(spec: LossSpec, logprobs: Tensor, columns: Columns, sequence_N: Tensor | None) -> Tensor:
    """A stand-in for a loss whose formula is not published: see docs/losses.md."""
    distance = logprobs - columns["logprobs"]
    high = columns.get("clip_high_threshold")
    high = distance.new_full((), spec.setting("clip_high_threshold")) if high is None else high
    weight = torch.minimum(torch.exp(distance.detach()), high)
    # Where nothing was sampled, as in a prompt, log-probs of the sampler are padding: there is no distance to hold.
    mask = columns.get("sequence_ratio_mask")
    sampled = (columns["advantages"] if mask is None else mask) != 0
    kept = torch.where(sampled, distance, torch.zeros_like(distance))
    return -weight * logprobs * columns["advantages"] + 0.5 * spec.setting("kl_coeff") * kept.square()


def _clipped(spec: LossSpec, ratio: Tensor, columns: Columns) -> Tensor:
    advantages = columns["advantages"]
    return -torch.minimum(ratio * advantages, _clamp(spec, ratio, columns) * advantages)


def _clamp(spec: LossSpec, ratio: Tensor, columns: Columns) -> Tensor:
    """Bound the ratio itself (not its distance from 1), per token where the batch says so."""
    low = columns.get("clip_low_threshold")
    high = columns.get("clip_high_threshold")
    low = ratio.new_full((), spec.setting("clip_low_threshold")) if low is None else low
    high = ratio.new_full((), spec.setting("clip_high_threshold")) if high is None else high
    return torch.minimum(torch.maximum(ratio, low), high)


_LOSSES: Mapping[str, Callable[[LossSpec, Tensor, Columns, Tensor | None], Tensor]] = {
    "cross_entropy": _cross_entropy,
    "importance_sampling": _importance_sampling,
    "ppo": _ppo,
    "cispo": _cispo,
    "dro": _dro,
    "gspo": _gspo,
    "stable_reinforce": _stable_reinforce,
}
