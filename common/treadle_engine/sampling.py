"""Draws one token per row of logits, each row by its own parameters and its own random number.

A row's token depends on that row alone, bit for bit: every operation here works row by row. This module does not
know models, sequences or where the random numbers come from.
"""

# Shape suffix legend
#   N = rows, M = some of the rows, V = vocabulary, C = candidates of one row

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from treadle_engine.sampling_params import SamplingParams


def sample_stream(seed: int, index: int) -> np.random.Generator:
    """Return the uniform random numbers of sample `index`: counter-based, keyed by (seed, index) alone."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, index], dtype=np.uint64)))


def draw(
    logits_NV: Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]
) -> tuple[list[int], list[float]]:
    """Return a token per row and its log-prob, tempered but before top-k and top-p (greedy: at temperature 1)."""
    tempered_NV = _temper(logits_NV, params)
    tokens_N = torch.zeros(len(params), dtype=torch.int64, device=logits_NV.device)
    greedy = [row for row, one in enumerate(params) if one.greedy]
    plain = [row for row, one in enumerate(params) if not one.greedy and not one.filtered]
    if greedy:
        tokens_N[greedy] = logits_NV[greedy].argmax(dim=-1)
    if plain:
        tokens_N[plain] = _inverse(_cumulate(tempered_NV[plain]), [uniforms[row] for row in plain])
    for row, one in enumerate(params):
        if not one.greedy and one.filtered:
            tokens_N[row] = _draw_filtered(tempered_NV[row], one, uniforms[row])
    logprobs_N = torch.log_softmax(tempered_NV, dim=-1).gather(1, tokens_N[:, None])[:, 0]
    return tokens_N.tolist(), logprobs_N.tolist()


def _temper(logits_NV: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    temperatures = [1.0 if one.greedy else one.temperature for one in params]
    if all(temperature == 1.0 for temperature in temperatures):
        return logits_NV
    # Shifted by the maximum, so that a tiny temperature gives minus infinity and not NaN; rows at temperature 1
    # keep their bits.
    column_N1 = torch.tensor(temperatures, dtype=torch.float64).to(logits_NV)[:, None]
    column_N1 = column_N1.clamp(min=torch.finfo(logits_NV.dtype).tiny)
    shift_N1 = torch.where(column_N1 == 1.0, 0.0, logits_NV.amax(dim=-1, keepdim=True))
    return (logits_NV - shift_N1) / column_N1


def _cumulate(tempered_MV: Tensor) -> Tensor:
    # softmax works row by row; exp over the whole tensor would round by where a row lies in it.
    return torch.softmax(tempered_MV, dim=-1).double().cumsum(dim=-1)


def _inverse(cumulated_MV: Tensor, uniforms: Sequence[float]) -> Tensor:
    """Return per row the first column whose cumulated mass exceeds uniform * total."""
    uniform_M1 = torch.tensor(uniforms, dtype=torch.float64, device=cumulated_MV.device)[:, None]
    goal_M1 = uniform_M1 * cumulated_MV[:, -1:]
    found_M1 = torch.searchsorted(cumulated_MV, goal_M1, right=True)
    return found_M1[:, 0].clamp(max=cumulated_MV.shape[1] - 1)


def _draw_filtered(tempered_V: Tensor, params: SamplingParams, uniform: float) -> Tensor:
    """Draw from the top-k tokens, then from the smallest set of those with top_p of their mass."""
    if 0 < params.top_k < tempered_V.shape[0]:
        values_C, ids_C = tempered_V.topk(params.top_k)
    else:
        values_C, ids_C = tempered_V.sort(descending=True, stable=True)
    cumulated_C = _cumulate(values_C)
    if params.top_p < 1.0:
        kept = int(torch.searchsorted(cumulated_C, cumulated_C[-1:] * params.top_p)) + 1
        cumulated_C = cumulated_C[:kept]
    return ids_C[_inverse(cumulated_C[None], [uniform])[0]]
