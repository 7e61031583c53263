"""Many samples of many adapters at once, one token per step; requests join and leave at every step.

A sample's tokens and log-probs follow from its prompt, adapter, parameters, seed and index, bit for bit on a CPU:
not from who shares the step, not from how its prompt was cut or whether parts of it were kept from another request,
and not from whether it lost its place in between. The decoder knows no threads, clocks or names of models: its owner
calls `step` as long as there is work. One thread owns a decoder and its base.
"""

# Shape suffix legend
#   T = rows of the step or tokens of a prompt, N = rows whose logits are needed, D = hidden, V = vocabulary

from __future__ import annotations

import itertools
import math
import weakref
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from treadle_engine.decode_attention import DecodeAttention, TextPart
from treadle_engine.decode_base import DecodeBase
from treadle_engine.decode_places import Places
from treadle_engine.decode_requests import (
    CacheCounts,
    DecodeEvent,
    FailedEvent,
    Prompt,
    PromptEvent,
    Reading,
    Sample,
    SampleRequest,
    TokenEvent,
)
from treadle_engine.errors import EngineError
from treadle_engine.kv_cache import KvCache, Slot
from treadle_engine.logprobs import all_logprobs
from treadle_engine.lora import AdapterWeights, Segment
from treadle_engine.prefix_cache import BlockKeys
from treadle_engine.prompt_scores import check_scores, read_scores, top_tokens
from treadle_engine.sampling import Drawn, TokenHistory, draw, sample_stream
from treadle_engine.sampling_params import MAX_SAMPLES, check_prompt, token_limit
from treadle_engine.step_turns import StepTurns
from treadle_engine.stops import Detokenize, StopRule

PREFILL_ROWS = 512
"""Most prompt tokens that one step reads."""

_ROWS_PER_READING = 16

_CROWD = 8
"""Prompts that keep more waiting than they hold up, if at most twice as many samples decode."""

_SHARED_ROWS = 64
"""Prompt tokens that a step may read however little the lightest of several owners brings."""

_FIXED_ROWS_CPU, _FIXED_ROWS_GPU = 16.0, 256.0
"""What a step takes whatever it holds, as so many samples' rows; on a GPU it is nearly all of a step (not measured)."""

_READ_ROW = 0.25
"""What a prompt token takes of a step, as so many samples' rows (measured on a CPU)."""


class Decoder:
    """Continuous batching over one base."""

    def __init__(
        self,
        base: DecodeBase,
        detokenize: Detokenize | None = None,
        *,
        max_sequences: int = 64,
        max_cache_tokens: int = 65_536,
        keep_prefixes: bool = True,
        settle: Callable[[Drawn], Drawn] | None = None,
    ) -> None:
        """Serve at most `max_sequences` at once, with keys and values of at most `max_cache_tokens` positions.

        `settle` gets each step's draws and returns those that count: ranks of one base must all go on with the same.
        """
        info = base.info
        self.num_steps = 0
        self.num_tokens = 0
        self.num_read = 0
        self.num_cached = 0
        self.owners: Counter[str] = Counter()
        """Sequences that were drawn or read in the last step, by the owners of their requests."""
        self._base = base
        self._detokenize = detokenize
        self._settle = settle
        # Any single request must fit, or it would wait for ever.
        positions = max(max_cache_tokens, 4 * info.max_context)
        cache = KvCache(info.num_layers, info.num_kv_heads, info.head_dim, base.dtype, base.device, positions)
        self._cache = cache
        self._places = Places(cache, max_sequences, keep_prefixes=keep_prefixes)
        self._turns = StepTurns(_FIXED_ROWS_CPU if base.device.type == "cpu" else _FIXED_ROWS_GPU)
        self._numbers = itertools.count(1)
        self._prompts: dict[int, Prompt] = {}
        self._seeds: weakref.WeakKeyDictionary[AdapterWeights, int] = weakref.WeakKeyDictionary()

    @property
    def has_work(self) -> bool:
        """Tell whether `step` would do anything."""
        return bool(self._prompts)

    @property
    def num_active(self) -> int:
        """Samples and prompts that have a place."""
        return self._places.num_taken

    @property
    def num_waiting(self) -> int:
        """Samples that have none yet, or had to give theirs up."""
        return sum(prompt.num_claims - prompt.num_claimed + len(prompt.paused) for prompt in self._prompts.values())

    @property
    def num_preemptions(self) -> int:
        """Samples that had to give up their place, ever."""
        return self._places.num_preemptions

    @property
    def num_cache_bytes(self) -> int:
        """Memory of keys and values, kept prefixes included, in bytes."""
        return self._cache.num_bytes

    @property
    def cache_counts(self) -> CacheCounts:
        """What is held of keys and values, and what came of it."""
        cache = self._cache
        return CacheCounts(
            cache.num_positions, cache.max_positions, self.num_read, self.num_cached, self._places.num_preemptions
        )

    def prepare(self) -> None:
        """Get memory for the first samples' keys and values, so that these need not wait for it."""
        self._cache.prepare()

    def forget_prefixes(self) -> None:
        """Drop what was kept of earlier requests."""
        self._cache.forget()

    def add(self, request: SampleRequest) -> int:
        """Queue a request and return its number.

        Raises EngineError BAD_SAMPLING_PARAMS, CONTEXT_OVERFLOW or TOKEN_OUT_OF_RANGE.
        """
        info = self._base.info
        if not 0 <= request.num_samples <= MAX_SAMPLES:
            raise EngineError("BAD_SAMPLING_PARAMS", f"num_samples must be 1..{MAX_SAMPLES}, got {request.num_samples}")
        request.params.check(info.vocab_size)
        check_prompt(info, request.prompt_T)
        wrong = check_scores(request, info.vocab_size)
        if wrong is not None:
            raise EngineError("BAD_SAMPLING_PARAMS", wrong)
        limit = token_limit(info, int(request.prompt_T.shape[0]), request.params) if request.num_samples else 0
        rule = StopRule(request.params, limit, info.eos_token_ids, self._detokenize)
        keys = BlockKeys(self._seed_of(request.weights))
        keys.extend(request.prompt_T)
        prompt = Prompt(next(self._numbers), request, rule, limit, keys, num_unfinished=request.num_samples)
        self._prompts[prompt.number] = prompt
        self._places.line.add(prompt)
        return prompt.number

    def cancel(self, number: int) -> None:
        """Forget a request and free its places; a finished or unknown one is no error."""
        prompt = self._prompts.pop(number, None)
        if prompt is not None:
            self._places.forget(prompt)

    @torch.no_grad()
    def step(self) -> list[DecodeEvent]:
        """Give waiting requests their places, run the base once, and return what came of it."""
        places = self._places
        places.admit()
        places.make_way()
        budget, taking_part = self._share_step()
        parts = places.choose_parts(budget, taking_part)
        resting = [sample for sample in places.samples if sample.prompt.owner not in taking_part]
        places.samples = _by_adapter([sample for sample in places.samples if sample.prompt.owner in taking_part])
        read: Counter[str] = Counter()
        for part, count in parts:
            read[part.prompt.owner] += count
        self._turns.charge(_rows_by_owner(_count_by_owner(places.samples), read))
        prompts = [*(sample.prompt for sample in places.samples), *(reading.prompt for reading, _ in parts)]
        self.owners = Counter(prompt.request.owner for prompt in prompts)
        logits_NV = self._run(parts) if parts or places.samples else None
        events: list[DecodeEvent] = []
        for reading in [reading for reading in places.readings if reading.is_done]:
            places.readings.remove(reading)
            events += self._finish_reading(reading)
        events += self._draw(logits_NV)
        places.samples += resting
        self.num_steps += 1
        return events

    def _share_step(self) -> tuple[int, list[str]]:
        """Return how many prompt tokens the step may read, and the owners who may be in it, in turn."""
        places, budget = self._places, self._row_budget()
        decoding = _count_by_owner(places.samples)
        unread: Counter[str] = Counter()
        for reading in places.readings:
            unread[reading.prompt.owner] += reading.num_rows - reading.cache.length
        room = self._turns.fair_length(_rows_by_owner(decoding, unread, budget)) - len(places.samples)
        budget = int(min(budget, max(_SHARED_ROWS, room / _READ_ROW)))
        return budget, self._turns.choose(_rows_by_owner(decoding, unread, budget))

    def _row_budget(self) -> int:
        """Return how many prompt tokens the step may read: all it can when nobody decodes.

        Else as many rows as decode, so that a step takes at most twice as long as without; more if many wait, all it
        can if they are a crowd.
        """
        decoding, reading = len(self._places.samples), len(self._places.readings)
        if not decoding or reading >= max(_CROWD, decoding // 2):
            return PREFILL_ROWS
        return min(PREFILL_ROWS, max(_ROWS_PER_READING * reading, decoding))

    def _seed_of(self, weights: AdapterWeights | None) -> bytes:
        """Return what stands for an adapter, as it is now, in the keys of its texts' blocks."""
        if weights is None:
            return b"base"
        number = self._seeds.setdefault(weights, next(self._numbers))
        return f"adapter {number} {weights.flat._version}".encode()

    def _run(self, parts: Sequence[tuple[Reading, int]]) -> Tensor:
        """Run the base; return logits_NV of the samples, and leave those of finished prompts with them."""
        samples = self._places.samples
        x_TD, last_rows = self._run_base(parts)
        first = x_TD.shape[0] - len(samples)
        asked = [reading.prompt for reading, _ in parts if reading.is_done and _wants_logits(reading)]
        rows = [*range(first, x_TD.shape[0]), *(last_rows[prompt.number] for prompt in asked)]
        if not rows:
            return x_TD.new_empty((0, self._base.info.vocab_size), dtype=torch.float32)
        weights = [*(sample.prompt.request.weights for sample in samples), *(one.request.weights for one in asked)]
        logits_NV = self._base.logits(x_TD[rows], self._base.adapters(_segments(weights, 0)))
        for row, prompt in enumerate(asked, start=len(samples)):
            prompt.logits_V = logits_NV[row].clone()
        return logits_NV[: len(samples)]

    def _run_base(self, parts: Sequence[tuple[Reading, int]]) -> tuple[Tensor, dict[int, int]]:
        """Run the step's rows; return x_TD and the row of each prompt's last token by the request's number.

        Beginnings of prompts whose own log-probs are asked for come first, in a pass as a trainer runs it: they have a
        trainer's bits whoever else is in the step.
        """
        scored = [(reading, count) for reading, count in parts if reading.next_packed]
        others = [(reading, count) for reading, count in parts if not reading.next_packed]
        passes = [self._run_rows(scored, (), as_trained=True)] if scored else []
        if others or self._places.samples:
            passes.append(self._run_rows(others, self._places.samples, as_trained=False))
        x_TD = passes[0] if len(passes) == 1 else torch.cat(passes)
        last_rows: dict[int, int] = {}
        row = 0
        for reading, count in (*scored, *others):
            read_scores(self._base, reading, x_TD[row : row + count])
            self._places.advance(reading, count)
            self.num_read += count
            row += count
            if reading.sample is None:
                last_rows[reading.prompt.number] = row - 1
        for sample in self._places.samples:
            _slot_of(sample).length += 1
        return x_TD, last_rows

    def _run_rows(self, parts: Sequence[tuple[Reading, int]], samples: Sequence[Sample], *, as_trained: bool) -> Tensor:
        """Run parts of texts and one row per sample; return x_TD in this order."""
        tokens: list[int] = []
        positions: list[int] = []
        weights: list[AdapterWeights | None] = []
        texts: list[Segment] = []
        for reading, count in parts:
            start, adapter = reading.cache.length, reading.prompt.request.weights
            texts.append(Segment(len(tokens), len(tokens) + count, adapter))
            tokens += reading.text_T[start : start + count].tolist()
            positions += range(start, start + count)
            weights += [adapter] * count
        slots = [_slot_of(sample) for sample in samples]
        tokens += [sample.tokens[-1] for sample in samples]
        positions += [slot.length for slot in slots]
        weights += [sample.prompt.request.weights for sample in samples]
        base, info, device = self._base, self._base.info, self._base.device
        plan = DecodeAttention(
            [TextPart(reading.cache, count, as_trained) for reading, count in parts],
            slots, self._cache.slabs, (info.num_heads, info.num_kv_heads), base.block_rows, device,
        )  # fmt: skip
        tokens_T, positions_T = torch.tensor(tokens, device=device), torch.tensor(positions, device=device)
        if as_trained:
            return base.hidden_as_trained(tokens_T, positions_T, plan, texts)
        return base.hidden(tokens_T, positions_T, plan, base.adapters(_segments(weights, 0)))

    def _finish_reading(self, reading: Reading) -> list[DecodeEvent]:
        """Let a sample that was read again decode on; tell what was asked about a prompt."""
        prompt = reading.prompt
        self.num_cached += reading.num_cached
        if reading.sample is not None:
            self._places.resume(reading)
            return []
        logprobs_T = reading.logprobs_T if reading.logprobs_T is not None else _EMPTY
        event = PromptEvent(prompt.number, logprobs_T, reading.top, reading.targets_TK, reading.num_cached)
        if not prompt.request.num_samples:
            self.cancel(prompt.number)
        return [event]

    def _draw(self, logits_NV: Tensor | None) -> list[DecodeEvent]:
        """Draw a token for every sample, and the first one for samples whose prompt is ready."""
        # Those that came back in this step have their newest token already, and no logits yet.
        drawing = self._places.samples[: 0 if logits_NV is None else logits_NV.shape[0]]
        self._places.samples = self._places.samples[len(drawing) :]
        drawn = [self._draw_rows(drawing, logits_NV)] if drawing and logits_NV is not None else []
        born: list[Sample] = []
        rows: list[Tensor] = []
        for prompt in self._prompts.values():
            if prompt.logits_V is None:
                continue
            for index in prompt.unborn:
                params = prompt.request.params
                history = TokenHistory(prompt.request.prompt_T) if params.penalised else None
                born.append(Sample(prompt, index, sample_stream(params.seed, index), history))
                rows.append(prompt.logits_V)
            prompt.unborn = []
        if born:
            # By themselves: to append them would copy the logits of all others.
            drawn.append(self._draw_rows(born, torch.stack(rows)))
        return self._take_all(drawing + born, drawn)

    def _draw_rows(self, samples: Sequence[Sample], logits_NV: Tensor) -> Drawn:
        """Draw a token for each of some samples from its row."""
        uniforms = [sample.stream.random() for sample in samples]
        params = [sample.prompt.request.params for sample in samples]
        drawn = draw(logits_NV, params, uniforms, [sample.history for sample in samples])
        return drawn if self._settle is None else self._settle(drawn)

    def _take_all(self, samples: Sequence[Sample], drawn: Sequence[Drawn]) -> list[DecodeEvent]:
        """Append every sample's token; end the requests of those whose numbers are none."""
        rows = [row for part in drawn for row in zip(*part, strict=True)]
        events: list[DecodeEvent] = []
        failed: dict[int, Prompt] = {}
        for sample, (token, logprob, tempered_V) in zip(samples, rows, strict=True):
            if not math.isfinite(logprob):
                failed[sample.prompt.number] = sample.prompt
                self._places.samples.append(sample)
                continue
            events.append(self._take(sample, token, logprob, tempered_V))
        for prompt in failed.values():
            error = EngineError("NAN_LOGITS", "the model's logits are not finite numbers: its weights have diverged")
            events.append(FailedEvent(prompt.number, error))
            del self._prompts[prompt.number]
            self._places.forget(prompt, wipe=True)
        for prompt in {sample.prompt.number: sample.prompt for sample in samples}.values():
            if not prompt.num_unfinished and prompt.number in self._prompts:
                self.cancel(prompt.number)
            elif prompt.num_claimed == prompt.num_claims and not prompt.unborn:
                self._places.drop_reading(prompt)
        return events

    def _take(self, sample: Sample, token: int, logprob: float, tempered_V: Tensor) -> TokenEvent:
        """Append a token; keep the sample, or end it and free its place."""
        prompt = sample.prompt
        sample.tokens.append(token)
        if sample.history is not None:
            sample.history.add(token)
        stop = prompt.rule.check(sample.tokens)
        self.num_tokens += 1
        count = prompt.request.num_top
        top = top_tokens(all_logprobs(tempered_V[None]), count) if count else None
        if stop is None:
            self._places.keep(sample)
        else:
            prompt.num_unfinished -= 1
            self._places.end(sample)
        return TokenEvent(prompt.number, sample.index, token, logprob, stop, top)


_EMPTY = torch.empty(0, dtype=torch.float32).numpy()


def _slot_of(sample: Sample) -> Slot:
    assert sample.slot is not None  # every decoding sample has one
    return sample.slot


def _wants_logits(reading: Reading) -> bool:
    return reading.sample is None and reading.prompt.request.num_samples > 0


def _count_by_owner(samples: Sequence[Sample]) -> Counter[str]:
    return Counter(sample.prompt.owner for sample in samples)


def _rows_by_owner(decoding: Counter[str], read: Counter[str], most_read: float = math.inf) -> dict[str, float]:
    """Return what each owner's samples, and the prompt tokens that it reads, take of a step, in samples' rows."""
    return {owner: decoding[owner] + _READ_ROW * min(most_read, read[owner]) for owner in decoding.keys() | read.keys()}


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
