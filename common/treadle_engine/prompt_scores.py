"""What the base says about a prompt's own tokens: log-probs of the tokens, of others, and the likeliest ones.

Computed as a trainer computes them, tile by tile, so that logits of a whole prompt never exist. This module does not
know caches or samples.
"""

# Shape suffix legend
#   T = tokens of a prompt, U = rows of one part, N = rows of a tile, D = hidden, V = vocabulary, K = targets

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from treadle_engine.decode_base import DecodeBase
from treadle_engine.decode_requests import Reading, SampleRequest, TopTokens
from treadle_engine.logprobs import all_logprobs
from treadle_engine.lora import Segment

# Float32 logits held at once: 2^23 values are 32 MiB.
_TILE_VALUES = 2**23


def prepare(reading: Reading) -> None:
    """Make the tables that the prompt's request asks for, with nothing in them yet."""
    request, length = reading.prompt.request, reading.text_T.shape[0]
    if reading.sample is not None:
        return
    if request.prompt_logprobs or not request.num_samples:
        reading.logprobs_T = np.full(length, np.nan, dtype=np.float32)
    if request.prompt_top:
        shape = (length, request.prompt_top)
        reading.top = TopTokens(np.full(shape, -1, dtype=np.int32), np.full(shape, np.nan, dtype=np.float32))
    if request.targets_TK is not None:
        reading.targets_TK = np.full(request.targets_TK.shape, np.nan, dtype=np.float32)


def read_scores(base: DecodeBase, reading: Reading, x_UD: Tensor) -> None:
    """Fill in what follows from the rows of a part; row u is at the text's position `cache.length` + u."""
    request = reading.prompt.request
    if reading.sample is not None or not request.scores_prompt:
        return
    first = reading.cache.length + 1  # a row speaks about the token after it
    stop = min(first + x_UD.shape[0], reading.text_T.shape[0])
    start = max(first, request.first_scored)
    tile = max(16, _TILE_VALUES // base.info.vocab_size)
    for place in range(start, stop, tile):
        end = min(stop, place + tile)
        x_ND = x_UD[place - first : end - first]
        segments = [] if request.weights is None else [Segment(0, end - place, request.weights)]
        logits_NV = base.logits(x_ND, segments)
        _note(reading, slice(place, end), all_logprobs(logits_NV))


def _note(reading: Reading, rows: slice, logprobs_NV: Tensor) -> None:
    request = reading.prompt.request

    def pick(ids_NK: np.ndarray[tuple[int, ...], np.dtype[np.int32]]) -> Tensor:
        wanted_NK = torch.from_numpy(ids_NK.astype(np.int64)).to(logprobs_NV.device)
        found_NK = logprobs_NV.gather(1, wanted_NK.clamp(min=0))
        return found_NK.masked_fill_(wanted_NK < 0, torch.nan).cpu()

    if reading.logprobs_T is not None:
        reading.logprobs_T[rows] = pick(request.prompt_T[rows, None])[:, 0].numpy()
    if reading.targets_TK is not None and request.targets_TK is not None:
        reading.targets_TK[rows] = pick(request.targets_TK[rows]).numpy()
    if reading.top is not None:
        found = top_tokens(logprobs_NV, request.prompt_top)
        reading.top.ids[rows], reading.top.logprobs[rows] = found.ids, found.logprobs


def top_tokens(logprobs_NV: Tensor, count: int) -> TopTokens:
    """Return the `count` likeliest tokens of each row, [N, count]."""
    values, ids = logprobs_NV.topk(count, dim=-1)
    return TopTokens(ids.cpu().numpy().astype(np.int32), values.cpu().numpy())


def check_scores(request: SampleRequest, vocab_size: int) -> str | None:
    """Return what is wrong with what a request asks about log-probs, None if nothing is."""
    for name, value in (("topk_logprobs", request.num_top), ("topk_prompt_logprobs", request.prompt_top)):
        if not 0 <= value <= vocab_size:
            return f"{name} must be 0..{vocab_size}, got {value}"
    if request.last_n is not None and request.last_n < 0:
        return f"prompt_logprobs_last_n must not be negative, got {request.last_n}"
    targets_TK = request.targets_TK
    if targets_TK is not None:
        if targets_TK.ndim != 2 or targets_TK.shape[0] != request.prompt_T.shape[0]:
            return f"targets must be [{request.prompt_T.shape[0]}, K], got {list(targets_TK.shape)}"
        if targets_TK.size and not (int(targets_TK.min()) >= -1 and int(targets_TK.max()) < vocab_size):
            return f"targets must be tokens 0..{vocab_size - 1}, or -1 for none"
    return None
