"""The small products of LoRA for one segment: forward, input gradient and the gradients of A and B.

Everything here is shaped [rank, rows] rather than [rows, rank]: a CPU multiplies a thin matrix several times faster
when its long side is contiguous. It knows tensors alone: no adapters, segments or linears.
"""

# Shape suffix legend
#   N = rows of one segment, I = in features, O = out features, R = rank, S = R times the sites of a group

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# From this rank up, a column of A x^T has the same bits whatever stands beside it or above it (measured: float32,
# 16 rows or more). Below it a product by [rows, rank], site by site, at least does not depend on the other rows.
_MIN_STACKED_RANK = 4


MANY_ROWS = 96
"""Rows of a segment from which products in bfloat16 pay on a CPU: there they are two to four times faster than in
float32, below it every call's setting up of a kernel costs more (rank 8 to 32, width 512 to 1536, AVX-512)."""


def product_dtype(dtype: torch.dtype, device: torch.device, num_rows: int = 0) -> torch.dtype:
    """Return the dtype of LoRA's products of a segment of `num_rows` over a base that computes in `dtype`.

    On a CPU it is float32 for short ones. Gradients of A and B are summed in float32 in any case.
    """
    return torch.float32 if device.type == "cpu" and num_rows < MANY_ROWS else dtype


class Block(NamedTuple):
    """A of some sites that share their input, one below the other, and each one's B transposed (or their gradients)."""

    a_SI: Tensor
    bt_ROs: tuple[Tensor, ...]

    def zeros(self) -> Block:
        """Return zeros of the same shapes."""
        return Block(torch.zeros_like(self.a_SI), tuple(torch.zeros_like(bt_RO) for bt_RO in self.bt_ROs))

    def add(self, other: Block) -> None:
        """Add `other` in place."""
        self.a_SI.add_(other.a_SI)
        for bt_RO, more_RO in zip(self.bt_ROs, other.bt_ROs, strict=True):
            bt_RO.add_(more_RO)


def add_lora(block: Block, x_NI: Tensor, ys: Sequence[Tensor], scale: float) -> Tensor:
    """Add scale * B A x to each y_NO in place; return low_SN = A x^T."""
    low_SN = down(block, x_NI)
    for bt_RO, low_RN, y_NO in zip(block.bt_ROs, _by_site(low_SN, block), ys, strict=True):
        add_product(y_NO, low_RN.t(), bt_RO, scale)
    return low_SN


def down(block: Block, x_NI: Tensor) -> Tensor:
    """Return low_SN = A x^T of all sites; each site's bits do not depend on the others."""
    if block.bt_ROs[0].shape[0] >= _MIN_STACKED_RANK:
        return block.a_SI.mm(x_NI.t())
    return torch.cat([x_NI.mm(a_RI.t()).t() for a_RI in block.a_SI.chunk(len(block.bt_ROs))])


def low_gradient(block: Block, gradients: Sequence[Tensor]) -> Tensor:
    """Return g_SN = B^T g^T of all sites, before the scale; `gradients` are those of the outputs, [N, O]."""
    if len(gradients) == 1:
        return block.bt_ROs[0].mm(gradients[0].t())
    g_SN = block.a_SI.new_empty(block.a_SI.shape[0], gradients[0].shape[0])
    for bt_RO, g_RN, g_NO in zip(block.bt_ROs, _by_site(g_SN, block), gradients, strict=True):
        torch.mm(bt_RO, g_NO.t(), out=g_RN)
    return g_SN


def add_to_input_gradient(block: Block, g_SN: Tensor, total_NI: Tensor, scale: float) -> None:
    """Add scale * g A to the gradient of the shared input."""
    add_product(total_NI, g_SN.t(), block.a_SI, scale)


def add_gradients(
    total: Block, g_SN: Tensor, low_SN: Tensor, x_NI: Tensor, gradients: Sequence[Tensor], scale: float
) -> None:
    """Add dA and dB to the float32 `total`."""
    _accumulate(total.a_SI, g_SN, x_NI, scale)
    for bt_RO, low_RN, g_NO in zip(total.bt_ROs, _by_site(low_SN, total), gradients, strict=True):
        _accumulate(bt_RO, low_RN, g_NO, scale)


def comes_once(dtype: torch.dtype, scale: float) -> bool:
    """Tell whether `add_gradients` may add to what is there with the bits of a sum by itself that is added then.

    A product in `dtype` other than float32 is added as a whole, and a power of two scales it without rounding.
    """
    return dtype != torch.float32 and math.frexp(scale)[0] == 0.5


def _by_site(stacked_SN: Tensor, block: Block) -> Sequence[Tensor]:
    return (stacked_SN,) if len(block.bt_ROs) == 1 else stacked_SN.chunk(len(block.bt_ROs))


def add_product(total: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """Add scale * left right to `total`, rounding to its dtype once."""
    if total.dtype == left.dtype:
        total.addmm_(left, right, alpha=scale)
    else:
        total.add_(left.mm(right), alpha=scale)


def _accumulate(total: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """Add scale * left right to the float32 `total`; the product is summed in float32 whatever the inputs are.

    Of bfloat16 a CPU's comes rounded, once: in float32 it would take twice as long, to be exact about the sum of
    numbers that have been rounded like that themselves.
    """
    if left.dtype == torch.float32:
        total.addmm_(left, right, alpha=scale)
    elif total.device.type == "cpu":
        total.add_(left.mm(right), alpha=scale)
    else:
        total.add_(torch.mm(left, right, out_dtype=torch.float32), alpha=scale)
