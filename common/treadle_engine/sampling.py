"""Draws one token per row of logits, each row by its own parameters, its own text and its own random number.

A row's token depends on that row alone, bit for bit: every operation here works row by row. The order is bias,
penalties, temperature (the log-probs that are reported), then top-k, top-p and min-p. This module does not know
models, sequences or where the random numbers come from.
"""

# Shape suffix legend
#   N = rows, M = some of the rows, V = vocabulary, C = candidates of a row, L = chunks of a row, U = tokens of a text

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from treadle_engine.logprobs import token_logprobs
from treadle_engine.sampling_params import SamplingParams

_CHUNK = 64
# Likeliest tokens that are looked at before a whole row is sorted.
_CANDIDATES = 1024


class TokenHistory:
    """What a text contains so far, for the penalties."""

    def __init__(self, prompt_T: npt.NDArray[np.int32]) -> None:
        """Start with a prompt and nothing drawn."""
        self._seen = set(np.unique(prompt_T).tolist())
        self._drawn: Counter[int] = Counter()

    def add(self, token: int) -> None:
        """Append a drawn token."""
        self._seen.add(token)
        self._drawn[token] += 1

    def penalise(self, logits_V: Tensor, params: SamplingParams) -> None:
        """Change a row in place: repetition over prompt and sample, presence and frequency over the sample alone."""
        if params.repetition_penalty != 1.0:
            ids_U = torch.tensor(sorted(self._seen), device=logits_V.device)
            found_U = logits_V[ids_U]
            factor = params.repetition_penalty
            logits_V[ids_U] = torch.where(found_U < 0, found_U * factor, found_U / factor)
        if self._drawn and (params.presence_penalty or params.frequency_penalty):
            ids_U = torch.tensor(list(self._drawn), device=logits_V.device)
            counts_U = torch.tensor(list(self._drawn.values()), dtype=logits_V.dtype, device=logits_V.device)
            logits_V[ids_U] -= params.presence_penalty + params.frequency_penalty * counts_U


class Drawn(NamedTuple):
    """A token per row, its log-prob, and the logits [N, V] that it was drawn from (greedy: at temperature 1)."""

    tokens: list[int]
    logprobs: list[float]
    tempered_NV: Tensor


def sample_stream(seed: int, index: int) -> np.random.Generator:
    """Return the uniform random numbers of sample `index`: counter-based, keyed by (seed, index) alone."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, index], dtype=np.uint64)))


def draw(
    logits_NV: Tensor,
    params: Sequence[SamplingParams],
    uniforms: Sequence[float],
    histories: Sequence[TokenHistory | None] = (),
) -> Drawn:
    """Draw a token per row; `histories` are needed where params ask for penalties."""
    tempered_NV = _temper(_edit(logits_NV, params, histories), params)
    tokens_N = torch.zeros(len(params), dtype=torch.int64, device=logits_NV.device)
    greedy = [row for row, one in enumerate(params) if one.greedy]
    plain = [row for row, one in enumerate(params) if not one.greedy and not one.filtered]
    cut = [row for row, one in enumerate(params) if not one.greedy and one.filtered]
    if greedy:
        tokens_N[greedy] = tempered_NV[greedy].argmax(dim=-1)
    prob_NV = torch.softmax(tempered_NV, dim=-1)
    if plain:
        chosen_MV = prob_NV if len(plain) == len(params) else prob_NV[plain]
        tokens_N[plain] = _inverse(chosen_MV, _column(uniforms, plain, logits_NV))
    if cut:
        tokens_N[cut] = _draw_cut(
            tempered_NV[cut], prob_NV[cut], [params[row] for row in cut], _column(uniforms, cut, logits_NV)
        )
    logprobs_N = token_logprobs(tempered_NV, prob_NV, tokens_N)
    return Drawn(tokens_N.tolist(), logprobs_N.tolist(), tempered_NV)


def _column(uniforms: Sequence[float], rows: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor([uniforms[row] for row in rows], dtype=torch.float64, device=like.device)[:, None]


def _edit(logits_NV: Tensor, params: Sequence[SamplingParams], histories: Sequence[TokenHistory | None]) -> Tensor:
    """Apply biases and penalties; rows without any keep their bits."""
    if not any(one.logit_bias or one.penalised for one in params):
        return logits_NV
    logits_NV = logits_NV.clone()
    for row, one in enumerate(params):
        if one.logit_bias:
            ids_U = torch.tensor([token for token, _ in one.logit_bias], device=logits_NV.device)
            biases_U = torch.tensor([bias for _, bias in one.logit_bias], dtype=torch.float64).to(logits_NV)
            logits_NV[row, ids_U] += biases_U
        history = histories[row] if histories else None
        if one.penalised and history is not None:
            history.penalise(logits_NV[row], one)
    return logits_NV


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


def _inverse(mass_MV: Tensor, uniform_M1: Tensor) -> Tensor:
    """Return per row the first column whose cumulated mass exceeds uniform * total: the chunk first, then within it."""
    rows, width = mass_MV.shape
    padded_MV = F.pad(mass_MV, (0, -width % _CHUNK)) if width % _CHUNK else mass_MV
    chunk_MLC = padded_MV.view(rows, -1, _CHUNK)
    edges_ML = chunk_MLC.sum(dim=-1).double().cumsum(dim=-1)
    goal_M1 = uniform_M1 * edges_ML[:, -1:]
    chunk_M1 = torch.searchsorted(edges_ML, goal_M1, right=True).clamp(max=edges_ML.shape[1] - 1)
    before_M1 = torch.where(chunk_M1 > 0, edges_ML.gather(1, (chunk_M1 - 1).clamp(min=0)), 0.0)
    inner_MC = chunk_MLC[torch.arange(rows, device=mass_MV.device), chunk_M1[:, 0]].double()
    within_M1 = torch.searchsorted(inner_MC.cumsum(dim=-1), goal_M1 - before_M1, right=True)
    # The chunk's sum and its elements round differently: never step past the last token that has any mass.
    last_M1 = (inner_MC > 0).long().mul(torch.arange(_CHUNK, device=mass_MV.device)).amax(dim=-1, keepdim=True)
    return (chunk_M1 * _CHUNK + torch.minimum(within_M1, last_M1))[:, 0]


def _draw_cut(tempered_MV: Tensor, prob_MV: Tensor, params: Sequence[SamplingParams], uniform_M1: Tensor) -> Tensor:
    """Draw from what top-k, top-p and min-p leave; `prob_MV` is the softmax."""
    vocabulary = tempered_MV.shape[1]
    tokens_M = torch.zeros(len(params), dtype=torch.int64, device=tempered_MV.device)
    groups: dict[int, list[int]] = {}
    for row, one in enumerate(params):
        # By the row's own parameters: how many candidates are looked at decides how equal ones are ordered.
        limited = 0 < one.top_k < vocabulary
        groups.setdefault(min(vocabulary, one.top_k if limited else _CANDIDATES), []).append(row)
    for count, rows in groups.items():
        chosen = [params[row] for row in rows]
        drawn_M, enough_M = _draw_candidates(tempered_MV[rows], prob_MV[rows], chosen, uniform_M1[rows], count)
        for place in (~enough_M).nonzero()[:, 0].tolist():
            own = slice(rows[place], rows[place] + 1)
            drawn_M[place] = _draw_candidates(
                tempered_MV[own], prob_MV[own], [chosen[place]], uniform_M1[own], vocabulary
            )[0][0]
        tokens_M[rows] = drawn_M
    return tokens_M


def _draw_candidates(
    tempered_MV: Tensor, prob_MV: Tensor, params: Sequence[SamplingParams], uniform_M1: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """Draw from the `count` likeliest tokens of each row; also tell where they hold all that the cuts leave."""
    values_MC, ids_MC = tempered_MV.topk(count)
    limited_M1 = _params_column(params, [0 < one.top_k <= count for one in params], tempered_MV)
    whole_MC = prob_MV.gather(1, ids_MC)
    prob_MC = torch.where(limited_M1 > 0, torch.softmax(values_MC, dim=-1), whole_MC).double()
    top_p_M1 = _params_column(params, [one.top_p for one in params], tempered_MV)
    min_p_M1 = _params_column(params, [one.min_p for one in params], tempered_MV)
    cumulated_MC = prob_MC.cumsum(dim=-1)
    # The smallest set with at least top_p: whoever stands behind that much mass goes. At 1 nobody does.
    stays_MC = (cumulated_MC - prob_MC < top_p_M1) | (top_p_M1 == 1.0)
    stays_MC &= prob_MC >= min_p_M1 * prob_MC[:, :1]
    stays_MC[:, 0] = True
    mass_MC = torch.where(stays_MC, prob_MC, 0.0)
    place_M = _inverse(mass_MC, uniform_M1)
    enough_M = (limited_M1[:, 0] > 0) | ~stays_MC[:, -1]
    if count == tempered_MV.shape[1]:
        enough_M = torch.ones_like(enough_M)
    return ids_MC.gather(1, place_M[:, None])[:, 0], enough_M


def _params_column(params: Sequence[SamplingParams], values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=like.device).view(len(params), 1)
