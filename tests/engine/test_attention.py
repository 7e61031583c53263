"""Packed attention on a CPU against attention written out in float64, one sequence after the other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from treadle_engine.attention_cpu import Sequences, packed_causal
from treadle_engine.grouped_gemm import available

SCALE = 0.3


def reference(q_LHd: Tensor, k_LGd: Tensor, v_LGd: Tensor) -> Tensor:
    """Return softmax(scale q k^T, causal) v of one sequence; each key head serves its share of query heads."""
    length, heads, _ = q_LHd.shape
    k_LHd, v_LHd = (x_LGd.repeat_interleave(heads // x_LGd.shape[1], dim=1) for x_LGd in (k_LGd, v_LGd))
    scores_HLL = SCALE * torch.einsum("qhd,khd->hqk", q_LHd, k_LHd)
    hidden_LL = torch.ones(length, length, dtype=torch.bool).triu(1)
    return torch.einsum("hqk,khd->qhd", scores_HLL.masked_fill(hidden_LL, -torch.inf).softmax(-1), v_LHd)


@pytest.fixture(params=["together", "one by one"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have short sequences go together, by grouped products, or every one by itself."""
    if request.param == "one by one":
        monkeypatch.setattr("treadle_engine.attention_short.available", lambda: False)
    elif not available():
        pytest.skip("torch brings no grouped product here")


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2), (3, 1)])
def test_output_and_gradients_are_those_of_the_formula(dtype: torch.dtype, heads: int, groups: int) -> None:
    """Lengths on both sides of every rule: one row, under a block, a row over one, around the long ones."""
    lengths = [1, 26, 65, 191, 192, 300, 256, 513]
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(lengths), heads, 16), (sum(lengths), groups, 16), (sum(lengths), groups, 16)]
    ours = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    gradient = torch.randn(shapes[0], generator=generator).to(dtype)
    exact = [stream.detach().double().requires_grad_() for stream in ours]
    output = packed_causal(*ours, Sequences(lengths), SCALE)
    output.backward(gradient)
    pieces = zip(*(stream.split(lengths) for stream in exact), strict=True)
    expected = torch.cat([reference(*piece) for piece in pieces])
    expected.backward(gradient.double())
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    for found, wanted in [(output, expected), *((a.grad, b.grad) for a, b in zip(ours, exact, strict=True))]:
        assert found is not None
        assert wanted is not None
        assert found.dtype == dtype
        assert (found.double() - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neighbours_change_no_bit(dtype: torch.dtype) -> None:
    """A sequence's output and gradients have the same bits alone and between others."""
    generator = torch.Generator().manual_seed(1)

    def gradients(pieces: list[list[Tensor]]) -> list[Tensor]:
        q, k, v = (torch.cat([piece[n] for piece in pieces]).requires_grad_() for n in range(3))
        output = packed_causal(q, k, v, Sequences([piece[0].shape[0] for piece in pieces]), SCALE)
        output.backward(torch.cat([piece[3] for piece in pieces]))
        assert q.grad is not None
        assert k.grad is not None
        assert v.grad is not None
        return [output.detach(), q.grad, k.grad, v.grad]

    def piece(length: int) -> list[Tensor]:
        return [torch.randn(length, heads, 16, generator=generator).to(dtype) for heads in (4, 2, 2, 4)]

    for length in (1, 5, 65, 190, 230, 513):
        own, before, after = piece(length), piece(33), piece(250)
        alone = gradients([own])
        together = gradients([before, own, after])
        for one, many in zip(alone, together, strict=True):
            assert torch.equal(one, many[33 : 33 + length])
