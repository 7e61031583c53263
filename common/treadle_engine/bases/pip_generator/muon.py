"""Muon in float32, all matrices of one shape at once.

torch's own Muon orthogonalises one matrix after another in bfloat16, which a CPU without native bfloat16 emulates:
three times the cost of the whole forward and backward pass at this size.
"""

# Shapes: M matrices of one shape, O rows, I columns.

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

_MOMENTUM = 0.95
_NEWTON_SCHULZ_STEPS = 5
_A, _B, _C = 3.4445, -4.7750, 2.0315  # the quintic that lifts small singular values fastest


class Muon:
    """Momentum whose update is made orthogonal, with decoupled weight decay; for 2-D weights only."""

    def __init__(self, matrices: Iterable[Tensor], weight_decay: float) -> None:
        """Group the matrices [O, I] by shape and start without momentum."""
        self._weight_decay = weight_decay
        self._groups: dict[torch.Size, list[Tensor]] = defaultdict(list)
        for matrix in matrices:
            self._groups[matrix.shape].append(matrix)
        self._momentum = {shape: torch.zeros(len(group), *shape) for shape, group in self._groups.items()}

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Update every matrix from its gradient."""
        for shape, group in self._groups.items():
            g_MOI = torch.stack([matrix.grad for matrix in group if matrix.grad is not None])
            momentum_MOI = self._momentum[shape].lerp_(g_MOI, 1.0 - _MOMENTUM)
            update_MOI = _orthogonalised(g_MOI.lerp(momentum_MOI, _MOMENTUM))
            size = learning_rate * math.sqrt(max(1.0, shape[0] / shape[1]))
            for matrix, update_OI in zip(group, update_MOI, strict=True):
                matrix.mul_(1.0 - learning_rate * self._weight_decay).sub_(update_OI, alpha=size)


def _orthogonalised(x_MOI: Tensor) -> Tensor:
    """Return matrices with the same singular vectors and singular values near 1, by Newton-Schulz iteration."""
    tall = x_MOI.shape[1] > x_MOI.shape[2]
    x: Tensor = x_MOI.mT if tall else x_MOI  # the Gram matrix is then the smaller one
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(_NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    return x.mT if tall else x
