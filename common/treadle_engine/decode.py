"""Many samples of many adapters at once, one token per step; requests join and leave at every step.

A sample's tokens and log-probs follow from its prompt, adapter, parameters, seed and index, bit for bit on a CPU,
whoever shares the step. The decoder knows no threads, clocks or names of models: its owner calls `step` as long as
there is work. One thread owns a decoder and its base.
"""

# Shape suffix legend
#   T = rows of the step or tokens of a prompt, N = rows whose logits are needed, U = rows of one prompt's part
#   D = hidden, V = vocabulary

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from treadle_engine.decode_attention import DecodeAttention, PromptPart
from treadle_engine.decode_base import DecodeBase, PaddedSegments
from treadle_engine.decode_requests import (
    DecodeEvent,
    FailedEvent,
    Prompt,
    PromptEvent,
    Sample,
    SampleRequest,
    TokenEvent,
    WaitingLine,
)
from treadle_engine.errors import EngineError
from treadle_engine.kv_cache import KvCache, PromptCache
from treadle_engine.logprobs import HeadChunk, run_head
from treadle_engine.lora import AdapterWeights, Segment
from treadle_engine.sampling import draw, sample_stream
from treadle_engine.sampling_params import MAX_SAMPLES, check_prompt, token_limit
from treadle_engine.stops import Detokenize, StopRule

PREFILL_PART = 512
"""Prompt tokens per step, and the length at which a prompt is cut: a long prompt delays the others' tokens little."""


class Decoder:
    """Continuous batching over one base."""

    def __init__(
        self,
        base: DecodeBase,
        detokenize: Detokenize | None = None,
        *,
        max_sequences: int = 64,
        max_cache_tokens: int = 65_536,
    ) -> None:
        """Serve at most `max_sequences` at once, with at most `max_cache_tokens` positions promised to them."""
        info = base.info
        self.num_steps = 0
        self.num_tokens = 0
        self._base = base
        self._detokenize = detokenize
        self._cache = KvCache(info.num_layers, info.num_kv_heads, info.head_dim, base.dtype, base.device)
        self._max_places = max_sequences
        # Any single request must fit, or it would wait for ever.
        self._max_tokens = max(max_cache_tokens, 2 * info.max_context)
        self._free_places, self._free_tokens = self._max_places, self._max_tokens
        self._numbers = itertools.count(1)
        self._prompts: dict[int, Prompt] = {}
        self._line = WaitingLine()
        self._filling: list[Prompt] = []
        self._samples: list[Sample] = []

    @property
    def has_work(self) -> bool:
        """Tell whether `step` would do anything."""
        return bool(self._prompts)

    @property
    def num_active(self) -> int:
        """Samples and prompts that have a place."""
        return self._max_places - self._free_places

    @property
    def num_waiting(self) -> int:
        """Samples that have none yet."""
        return sum(prompt.num_claims - prompt.num_claimed for prompt in self._line)

    @property
    def num_cache_bytes(self) -> int:
        """Memory of the decoding sequences' keys and values, in bytes."""
        return self._cache.num_bytes

    def add(self, request: SampleRequest) -> int:
        """Queue a request and return its number.

        Raises EngineError BAD_SAMPLING_PARAMS, CONTEXT_OVERFLOW or TOKEN_OUT_OF_RANGE.
        """
        info = self._base.info
        if not 0 <= request.num_samples <= MAX_SAMPLES:
            raise EngineError("BAD_SAMPLING_PARAMS", f"num_samples must be 1..{MAX_SAMPLES}, got {request.num_samples}")
        request.params.check(info.vocab_size)
        check_prompt(info, request.prompt_T)
        length = int(request.prompt_T.shape[0])
        limit = token_limit(info, length, request.params) if request.num_samples else 0
        rule = StopRule(request.params, limit, info.eos_token_ids, self._detokenize)
        prompt = Prompt(next(self._numbers), request, rule, limit, num_unfinished=request.num_samples)
        if request.prompt_logprobs or not request.num_samples:
            prompt.logprobs_T = np.full(length, np.nan, dtype=np.float32)
        self._prompts[prompt.number] = prompt
        self._line.add(prompt)
        return prompt.number

    def cancel(self, number: int) -> None:
        """Forget a request and free its places; a finished or unknown one is no error."""
        prompt = self._prompts.get(number)
        if prompt is not None:
            self._forget(prompt)

    @torch.no_grad()
    def step(self) -> list[DecodeEvent]:
        """Give waiting requests their places, run the base once, and return what came of it."""
        self._admit()
        parts = self._choose_parts()
        events: list[DecodeEvent] = []
        self._samples = _by_adapter(self._samples)
        finished = [prompt for prompt, count in parts if _start(prompt) + count == prompt.num_rows]
        logits_NV = self._run(parts, finished) if parts or self._samples else None
        for prompt in finished:
            self._filling.remove(prompt)
            if prompt.logprobs_T is not None:
                events.append(PromptEvent(prompt.number, prompt.logprobs_T))
            if not prompt.request.num_samples:
                self._forget(prompt)
        events += self._draw(logits_NV)
        self.num_steps += 1
        return events

    def _admit(self) -> None:
        while self._free_places and (prompt := self._line.head()) is not None:
            if prompt.claim_cost > self._free_tokens:
                return
            self._free_places -= 1
            self._free_tokens -= prompt.claim_cost
            if not prompt.num_claimed:
                prompt.cache = self._cache.new_prompt(prompt.length)
                self._filling.append(prompt)
            if prompt.request.num_samples:
                prompt.unborn.append(prompt.num_claimed)
            self._line.claim(prompt)

    def _choose_parts(self) -> list[tuple[Prompt, int]]:
        """Return prompts and how many of their tokens this step takes; fresh prompts first."""
        chosen: list[tuple[Prompt, int]] = []
        left = PREFILL_PART
        for prompt in self._filling:
            # Cut by the prompt's own length: its numbers must not depend on what else fits into the step.
            count = min(PREFILL_PART, prompt.num_rows - _start(prompt))
            if count > left:
                break
            chosen.append((prompt, count))
            left -= count
        return sorted(chosen, key=lambda part: _start(part[0]) > 0)

    def _run(self, parts: Sequence[tuple[Prompt, int]], finished: Sequence[Prompt]) -> Tensor:
        """Run the base; return logits_NV of the samples, and leave those of finished prompts with them."""
        x_TD, last_rows = self._run_base(parts)
        first = x_TD.shape[0] - len(self._samples)
        asked = [prompt for prompt in finished if prompt.request.num_samples]
        rows = [*range(first, x_TD.shape[0]), *(last_rows[prompt.number] for prompt in asked)]
        if not rows:
            return x_TD.new_empty((0, self._base.info.vocab_size), dtype=torch.float32)
        count = len(self._samples)
        segments = _segments([sample.prompt.request.weights for sample in self._samples], 0)
        for row, prompt in enumerate(asked, start=count):
            segments += _segments([prompt.request.weights], row)
        logits_NV = self._base.logits(x_TD[rows], PaddedSegments(segments, self._base.device))
        for row, prompt in enumerate(asked, start=count):
            prompt.logits_V = logits_NV[row].clone()
        return logits_NV[:count]

    def _run_base(self, parts: Sequence[tuple[Prompt, int]]) -> tuple[Tensor, dict[int, int]]:
        """Run the step's rows; return x_TD and the row of each part's last token by the request's number."""
        tokens: list[int] = []
        positions: list[int] = []
        segments: list[Segment] = []
        last_rows: dict[int, int] = {}
        planned: list[PromptPart] = []
        for prompt, count in parts:
            start = _start(prompt)
            segments += _segments([prompt.request.weights] * count, len(tokens))
            tokens += prompt.request.prompt_T[start : start + count].tolist()
            positions += range(start, start + count)
            last_rows[prompt.number] = len(tokens) - 1
            planned.append(PromptPart(_cache_of(prompt), count))
        segments += _segments([sample.prompt.request.weights for sample in self._samples], len(tokens))
        for sample in self._samples:
            assert sample.slot is not None  # every decoding sample has one
            sample.slot = self._cache.make_room(sample.slot)
            tokens.append(sample.tokens[-1])
            positions.append(sample.slot.length)
        slots = [sample.slot for sample in self._samples if sample.slot is not None]
        device = self._base.device
        plan = DecodeAttention(planned, slots, self._cache.slabs, device)
        tokens_T, positions_T = torch.tensor(tokens, device=device), torch.tensor(positions, device=device)
        x_TD = self._base.hidden(tokens_T, positions_T, plan, PaddedSegments(segments, device))
        row = 0
        for prompt, count in parts:
            self._read_logprobs(prompt, count, x_TD[row : row + count])
            _cache_of(prompt).length += count
            row += count
        for slot in slots:
            slot.length += 1
        return x_TD, last_rows

    def _read_logprobs(self, prompt: Prompt, count: int, x_UD: Tensor) -> None:
        """Note the log-probs of the tokens that follow a part's rows, computed as a trainer computes them."""
        start = _start(prompt)
        targets = prompt.request.prompt_T[start + 1 : start + 1 + count]
        if prompt.logprobs_T is None or not targets.shape[0]:
            return
        logprobs_T = prompt.logprobs_T

        def keep(rows: slice, values_NK: Tensor) -> None:
            logprobs_T[start + 1 + rows.start : start + 1 + rows.stop] = values_NK[:, 0].cpu().numpy()

        device = x_UD.device
        targets_NK = torch.from_numpy(targets.astype(np.int64))[:, None].to(device)
        rows_N = torch.arange(targets.shape[0], device=device)
        run_head(self._base, x_UD, [HeadChunk(rows_N, targets_NK, Segment(0, 0, prompt.request.weights), keep)], None)

    def _draw(self, logits_NV: Tensor | None) -> list[DecodeEvent]:
        """Draw a token for every sample, and the first one for samples whose prompt is ready."""
        born, rows = [], [] if logits_NV is None else [logits_NV]
        for prompt in list(self._prompts.values()):
            if prompt.logits_V is None:
                continue
            for index in prompt.unborn:
                born.append(Sample(prompt, index, sample_stream(prompt.request.params.seed, index)))
                rows.append(prompt.logits_V[None])
            prompt.unborn = []
        samples = self._samples + born
        if not samples:
            return []
        uniforms = [sample.stream.random() for sample in samples]
        tokens, logprobs = draw(torch.cat(rows), [sample.prompt.request.params for sample in samples], uniforms)
        events: list[DecodeEvent] = []
        failed: dict[int, Prompt] = {}
        self._samples = []
        for sample, token, logprob in zip(samples, tokens, logprobs, strict=True):
            if not math.isfinite(logprob):
                failed[sample.prompt.number] = sample.prompt
                self._samples.append(sample)
                continue
            events.append(self._take(sample, token, logprob))
        self._drop_finished_prompts({sample.prompt.number: sample.prompt for sample in born}.values())
        for prompt in failed.values():
            error = EngineError("BAD_ADAPTER_FILE", "the model's logits are not finite numbers")
            events.append(FailedEvent(prompt.number, error))
            self._forget(prompt, wipe=True)
        return events

    def _take(self, sample: Sample, token: int, logprob: float) -> TokenEvent:
        """Append a token; keep the sample, or end it and free its place."""
        prompt = sample.prompt
        sample.tokens.append(token)
        stop = prompt.rule.check(sample.tokens)
        self.num_tokens += 1
        if stop is None:
            if sample.slot is None:
                sample.slot = self._cache.fork(_cache_of(prompt))
            self._samples.append(sample)
        else:
            prompt.num_unfinished -= 1
            self._free_sample(sample)
        return TokenEvent(prompt.number, sample.index, token, logprob, stop)

    def _drop_finished_prompts(self, prompts: Iterable[Prompt]) -> None:
        for prompt in prompts:
            if prompt.num_claimed == prompt.num_claims:
                self._free_prompt(prompt)
        self._prompts = {
            number: prompt
            for number, prompt in self._prompts.items()
            if prompt.num_unfinished or not prompt.request.num_samples
        }

    def _forget(self, prompt: Prompt, *, wipe: bool = False) -> None:
        """Free all that a request holds; `wipe` what may hold values that are not finite."""
        self._prompts.pop(prompt.number, None)
        self._line.remove(prompt)
        if prompt in self._filling:
            self._filling.remove(prompt)
        for sample in [sample for sample in self._samples if sample.prompt is prompt]:
            self._samples.remove(sample)
            self._free_sample(sample, wipe=wipe)
        for _ in prompt.unborn:
            self._free_claim(prompt)
        if not prompt.request.num_samples and prompt.num_claimed:
            self._free_claim(prompt)
        prompt.unborn = []
        self._free_prompt(prompt)

    def _free_sample(self, sample: Sample, *, wipe: bool = False) -> None:
        if sample.slot is not None:
            self._cache.release(sample.slot, wipe=wipe)
            sample.slot = None
        self._free_claim(sample.prompt)

    def _free_claim(self, prompt: Prompt) -> None:
        self._free_places += 1
        self._free_tokens += prompt.length + prompt.limit if prompt.request.num_samples else 0
        self._line.give_back(prompt.request.owner)

    def _free_prompt(self, prompt: Prompt) -> None:
        if prompt.cache is not None:
            self._free_tokens += prompt.length
            prompt.cache = prompt.logits_V = None


def _start(prompt: Prompt) -> int:
    return 0 if prompt.cache is None else prompt.cache.length


def _cache_of(prompt: Prompt) -> PromptCache:
    assert prompt.cache is not None  # from its first claim to its last sample's birth
    return prompt.cache


def _by_adapter(samples: Sequence[Sample]) -> list[Sample]:
    """Return the samples with those of one adapter next to each other."""
    order: dict[int, int] = {}
    for sample in samples:
        order.setdefault(id(sample.prompt.request.weights), len(order))
    return sorted(samples, key=lambda sample: order[id(sample.prompt.request.weights)])


def _segments(weights: Sequence[AdapterWeights | None], first: int) -> list[Segment]:
    """Return the segments of consecutive rows from `first` on; rows of the plain base need none."""
    segments: list[Segment] = []
    row = first
    for adapter, group in itertools.groupby(weights):
        count = sum(1 for _ in group)
        if adapter is not None:
            segments.append(Segment(row, row + count, adapter))
        row += count
    return segments
