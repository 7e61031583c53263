"""The head's log-probs: what log_softmax gives, and the same bits wherever a row lies."""

from __future__ import annotations

import torch

from treadle_engine.logprobs import all_logprobs


def test_logprobs_equal_log_softmax_in_float64() -> None:
    """Also where probabilities underflow: rows of wide and of narrow spread agree with the exact values."""
    generator = torch.Generator().manual_seed(0)
    logits_NV = torch.randn(64, 1003, generator=generator) * torch.logspace(-2, 2.5, 64)[:, None]
    exact_NV = torch.log_softmax(logits_NV.double(), dim=-1)
    torch.testing.assert_close(all_logprobs(logits_NV).double(), exact_NV, rtol=3e-7, atol=3e-7)


def test_a_rows_logprobs_do_not_depend_on_its_place() -> None:
    """Each row alone, at every end of every cut, has the bits that it has among all rows."""
    logits_NV = torch.randn(67, 307, generator=torch.Generator().manual_seed(1)) * 3
    whole_NV = all_logprobs(logits_NV)
    for start in range(67):
        for size in (1, 3, 8, 21):
            cut = slice(start, start + size)
            assert torch.equal(all_logprobs(logits_NV[cut]), whole_NV[cut])
