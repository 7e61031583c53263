"""The kernels between a step's products, against transformers' modules, and row by row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.activations import silu
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

from treadle_engine.decode_lean import _gate, _normalise, _rotate

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
SIZES = pytest.mark.parametrize(("rows", "width"), [(1, 8), (5, 64), (33, 100), (600, 576)])


def numbers(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return (2.0 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def assert_near(found: Tensor, expected: Tensor, roundings: int = 1) -> None:
    """Float32 agrees to some millionths, bfloat16 to the last place, once per rounding."""
    if found.dtype == torch.float32:
        torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6)
        return
    bound = roundings * 2**-7 * expected.abs().float().clamp(min=1e-2)
    assert bool(((found.float() - expected.float()).abs() <= bound).all())


def norm_of(width: int, dtype: torch.dtype) -> Qwen3RMSNorm:
    norm = Qwen3RMSNorm(width, eps=1e-5).to(dtype)
    norm.weight.data.copy_(numbers(width, dtype=dtype, seed=1))
    return norm.requires_grad_(False)


@DTYPES
@SIZES
def test_the_norm_is_that_of_transformers(rows: int, width: int, dtype: torch.dtype) -> None:
    """With and without something to add first; what was added stays."""
    norm, x, z = norm_of(width, dtype), numbers(rows, width, dtype=dtype), numbers(rows, width, dtype=dtype, seed=2)
    y, total = torch.empty_like(x), x + z
    _normalise(norm, x, None, y)
    assert_near(y, norm(x), roundings=2)
    _normalise(norm, x, z, y)
    assert torch.equal(x, total)
    assert_near(y, norm(total), roundings=2)


@DTYPES
def test_heads_are_turned_as_transformers_turns_them(dtype: torch.dtype) -> None:
    q_PHd, k_PGd = numbers(37, 6, 64, dtype=dtype), numbers(37, 2, 64, dtype=dtype, seed=1)
    angle_P1 = torch.arange(37)[:, None] / 10 ** torch.linspace(0, 4, 32)
    angle_Pd = torch.cat((angle_P1, angle_P1), dim=-1)
    cosine_Pd, sine_Pd = angle_Pd.cos().to(dtype), angle_Pd.sin().to(dtype)
    turned = apply_rotary_pos_emb(
        q_PHd.transpose(0, 1)[None].float(),
        k_PGd.transpose(0, 1)[None].float(),
        cosine_Pd[None].float(),
        sine_Pd[None].float(),
    )
    for x_Phd, expected_1hPd in zip((q_PHd, k_PGd), turned, strict=True):
        _rotate(x_Phd, cosine_Pd, sine_Pd)
        assert_near(x_Phd, expected_1hPd[0].transpose(0, 1).to(dtype))


@DTYPES
@SIZES
def test_the_gate_is_silu_times_up(rows: int, width: int, dtype: torch.dtype) -> None:
    gate, up = numbers(rows, width, dtype=dtype), numbers(rows, width, dtype=dtype, seed=3)
    expected = (silu(gate.double()) * up.double()).to(dtype)
    _gate(gate, up)
    assert_near(gate, expected)


def test_the_gate_has_no_holes() -> None:
    """Very large and very small inputs, and what is no number."""
    gate = torch.tensor([[-200.0, -88.0, -20.0, -0.0, 0.0, 20.0, 88.0, 1e30, float("inf"), float("nan")]])
    expected = silu(gate)
    _gate(gate, torch.ones_like(gate))
    torch.testing.assert_close(gate, expected, rtol=1e-6, atol=1e-30, equal_nan=True)


@DTYPES
def test_rows_and_threads_change_no_bit(dtype: torch.dtype) -> None:
    """A row alone, and among others on two threads."""
    norm = norm_of(576, dtype)
    x, gate, up = (numbers(700, 576, dtype=dtype, seed=seed) for seed in range(3))
    heads, cosine, sine = x.view(700, 9, 64).clone(), gate[:, :64].contiguous(), up[:, :64].contiguous()
    y = torch.empty_like(x)
    row = [tensor[411:412].clone() for tensor in (x, gate, up, heads, cosine, sine)]
    torch.set_num_threads(2)
    _normalise(norm, x, None, y)
    _gate(gate, up)
    _rotate(heads, cosine, sine)
    torch.set_num_threads(1)
    alone = torch.empty_like(row[0])
    _normalise(norm, row[0], None, alone)
    _gate(row[1], row[2])
    _rotate(row[3], row[4], row[5])
    assert torch.equal(alone[0], y[411])
    assert torch.equal(row[1][0], gate[411])
    assert torch.equal(row[3][0], heads[411])
