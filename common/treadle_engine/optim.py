"""AdamW over one flat buffer: the training state of a run, its step, snapshot and digest.

It needs no base model, so that a step can run beside other runs' passes. It does not know ops, runs or storage.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from treadle_engine.errors import EngineError
from treadle_engine.lora import AdapterBase, AdapterLayout, AdapterWeights, LoraConfig

# Elements that an optimizer step works on at a time: the five buffers of a block stay in a CPU's cache together.
_BLOCK = 2**17


@dataclass
class TrainState:
    """Everything of a run that changes: weights, gradient and both moments (flat float32), and the step count."""

    weights: AdapterWeights
    grads: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: int = 0
    has_gradient: bool = False
    """False only while `grads` is zero."""

    @classmethod
    def fresh(cls, weights: AdapterWeights) -> TrainState:
        """Start training the given weights with a new optimizer."""
        flat = weights.flat
        return cls(weights, torch.zeros_like(flat), torch.zeros_like(flat), torch.zeros_like(flat))

    def clear_gradient(self) -> None:
        """Drop what has been accumulated."""
        self.grads.zero_()
        self.has_gradient = False

    @property
    def num_bytes(self) -> int:
        """Memory held, in bytes."""
        return self.weights.num_bytes + self.grads.nbytes + self.exp_avg.nbytes + self.exp_avg_sq.nbytes

    def digest(self) -> str:
        """Return the xxh3-128 (hex) over weights, moments and step; the gradient is not part of it.

        It is taken after each step, to find a replay that went another way; nobody need be kept from forging it.
        """
        return _digest(self.step, self.weights.flat, self.exp_avg, self.exp_avg_sq)


@dataclass(frozen=True)
class ParkedState:
    """An idle run's state in host memory: what `state_tensors` holds, without gradient and without compute copy."""

    config: LoraConfig
    tensors: dict[str, Tensor]

    @property
    def num_bytes(self) -> int:
        """Memory held, in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def digest(self) -> str:
        """Return what `TrainState.digest` returned before the state was parked."""
        kept = self.tensors
        return _digest(int(kept["step"]), kept["weights"], kept["exp_avg"], kept["exp_avg_sq"])


@dataclass(frozen=True)
class AdamParams:
    """AdamW with decoupled decay; `grad_clip_norm` 0 turns clipping off."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0

    def __post_init__(self) -> None:
        """Refuse values with which the step would be meaningless."""
        for name in ("learning_rate", "eps", "weight_decay", "grad_clip_norm"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise EngineError("BAD_VALUE", f"{name} must be finite and not negative, got {value}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise EngineError("BAD_VALUE", f"{name} must be in [0, 1), got {getattr(self, name)}")


@torch.no_grad()
def add_gradients(state: TrainState, shares: Sequence[NDArray[np.float32]]) -> None:
    """Add what chunks gave that were computed apart, in order: the bits are those of computing them here."""
    flat = state.grads
    size = _BLOCK if flat.device.type == "cpu" else max(1, flat.numel())
    state.has_gradient = True
    for start in range(0, flat.numel(), size):
        total = flat[start : start + size]
        for share in shares:
            total.add_(torch.from_numpy(share[start : start + size]).to(flat.device))


@torch.no_grad()
def optim_step(state: TrainState, params: AdamParams) -> dict[str, float]:
    """Apply one AdamW step, zero the gradient and return metrics; after NAN_GRADIENT nothing else has changed.

    One sweep over memory reads the gradient's norm, a second does all the rest, block by block while it is in cache.
    """
    flat = state.weights.flat
    size = _BLOCK if flat.device.type == "cpu" else max(1, flat.numel())
    grad_norm = _norm([torch.linalg.vector_norm(grad) for grad in torch.split(state.grads, size)])
    if not math.isfinite(grad_norm):
        state.clear_gradient()
        raise EngineError("NAN_GRADIENT", "the accumulated gradient is not finite; it was dropped")
    clipped = 0.0 < params.grad_clip_norm < grad_norm
    count = torch.tensor(float(state.step + 1), device=flat.device)
    before = torch.empty(min(size, flat.numel()), device=flat.device)
    update_parts, weight_parts = [], []
    buffers = (flat, state.grads, state.exp_avg, state.exp_avg_sq)
    for weight, grad, exp_avg, exp_avg_sq in zip(*(torch.split(buffer, size) for buffer in buffers), strict=True):
        old = before[: weight.shape[0]].copy_(weight)
        if clipped:
            grad.mul_(params.grad_clip_norm / (grad_norm + 1e-6))
        # The kernel under torch.optim.AdamW(fused=True); its wrapper costs more than a block's arithmetic.
        torch._fused_adamw_(
            [weight],
            [grad],
            [exp_avg],
            [exp_avg_sq],
            [],
            [count],
            lr=params.learning_rate,
            beta1=params.beta1,
            beta2=params.beta2,
            weight_decay=params.weight_decay,
            eps=params.eps,
            amsgrad=False,
            maximize=False,
        )
        update_parts.append(torch.linalg.vector_norm(old.sub_(weight)))
        weight_parts.append(torch.linalg.vector_norm(weight))
        grad.zero_()
    state.step += 1
    state.has_gradient = False
    state.weights.refresh()
    return {
        "grad_norm:mean": grad_norm,
        "update_norm:mean": _norm(update_parts),
        "weight_norm:mean": _norm(weight_parts),
        "learning_rate:mean": params.learning_rate,
        "clip_fraction:mean": float(clipped),
    }


def _norm(parts: list[Tensor]) -> float:
    """Return the norm of what has these float32 norms, added up in float64."""
    return float(torch.linalg.vector_norm(torch.stack(parts), dtype=torch.float64)) if parts else 0.0


def state_tensors(state: TrainState) -> dict[str, Tensor]:
    """Return weights, moments and step, not copied; at a step boundary, so without the gradient."""
    kept = {"weights": state.weights.flat.detach(), "exp_avg": state.exp_avg, "exp_avg_sq": state.exp_avg_sq}
    return {**kept, "step": torch.tensor([state.step], dtype=torch.int64)}


def restore(
    base: AdapterBase, config: LoraConfig, tensors: Mapping[str, Tensor], grads: Tensor | None = None
) -> TrainState:
    """Build the state that `state_tensors` gave, in buffers of its own; INCOMPATIBLE_ADAPTER if it does not fit.

    The gradient is empty: `grads`, zeros on the base's device, or a new buffer.
    """
    missing = {"weights", "exp_avg", "exp_avg_sq", "step"} - set(tensors)
    if missing:
        raise EngineError("INCOMPATIBLE_ADAPTER", f"the snapshot lacks {sorted(missing)}")
    num_elements = AdapterLayout(base.lora_sites(config), config.rank).num_elements
    own: list[Tensor] = []
    for name in ("weights", "exp_avg", "exp_avg_sq"):
        value = tensors[name]
        if value.shape != (num_elements,) or value.dtype != torch.float32:
            raise EngineError("INCOMPATIBLE_ADAPTER", f"{name}: expected {num_elements} float32 values")
        own.append(value.to(base.device, copy=True))
    weights = AdapterWeights(base, config, own[0])
    grads = torch.zeros_like(weights.flat) if grads is None else grads
    return TrainState(weights, grads, own[1], own[2], int(tensors["step"]))


def park(state: TrainState) -> ParkedState:
    """Move a state at a step boundary to host memory; on a CPU its buffers stay where they are.

    The gradient must be zero: it is given up, not kept.
    """
    tensors = {"weights": state.weights.flat, "exp_avg": state.exp_avg, "exp_avg_sq": state.exp_avg_sq}
    if state.weights.flat.is_cuda:
        # Pinned memory goes back over the bus at full speed and without a copy in between.
        tensors = {name: tensor.to("cpu").pin_memory() for name, tensor in tensors.items()}
    return ParkedState(state.weights.config, {**tensors, "step": torch.tensor([state.step], dtype=torch.int64)})


def unpark(base: AdapterBase, parked: ParkedState, grads: Tensor | None = None) -> TrainState:
    """Bring a parked state back to the base's device, bit for bit; the gradient is as in `restore`."""
    kept = {name: tensor.to(base.device, non_blocking=True) for name, tensor in parked.tensors.items()}
    weights = AdapterWeights(base, parked.config, kept["weights"])
    step = int(parked.tensors["step"])
    grads = torch.zeros_like(weights.flat) if grads is None else grads
    return TrainState(weights, grads, kept["exp_avg"], kept["exp_avg_sq"], step)


def _digest(step: int, *tensors: Tensor) -> str:
    digest = xxhash.xxh3_128(step.to_bytes(8, "little"))
    for tensor in tensors:
        digest.update(tensor.detach().cpu().numpy().data)
    return digest.hexdigest()
