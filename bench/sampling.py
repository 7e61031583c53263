"""`python -m bench sampling`: the sampling engine against generate, PEFT's mixed batch and continuous batching.

Everything is float32 on one thread unless told otherwise. The sides of a comparison run in turn, several rounds, and
a figure is the median of the rounds' ratios of CPU seconds; wall seconds stand beside them. What a mechanism saves is
counted in tokens where counting says more than time.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from bench.sampling_baselines import (
    ContinuousGenerate,
    Load,
    MixedGenerate,
    PaddedGenerate,
    PeftModel,
    SequentialGenerate,
    run_vllm,
)
from treadle_engine.bases import resolve
from treadle_engine.decode import Decoder
from treadle_engine.decode_base import DecodeBase
from treadle_engine.decode_requests import SampleRequest
from treadle_engine.determinism import settle
from treadle_engine.lora import AdapterWeights, LoraConfig
from treadle_engine.sampling_params import SamplingParams

Row = dict[str, str]
Times = dict[str, list[tuple[float, float]]]
PARTS = ("throughput", "group", "turns", "join")
_MIXED, _BASE = "engine, mixed adapters", "engine, base alone"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds what may be chosen."""
    parser.add_argument("--base", choices=("smollm2", "pip"), default="smollm2")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64, help="new tokens per request")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--without", nargs="+", choices=("sequential", "continuous"), default=(), help="sides left out")
    parser.add_argument("--no-prepack", action="store_true", help="decode over the weights as they were loaded")
    parser.add_argument("--vllm", metavar="PYTHON", default="", help="an interpreter that has vLLM, to add its side")


def run(options: argparse.Namespace) -> list[Row]:
    """Runs the chosen parts."""
    settle(1)
    folder, name = resolve(options.base, Path.home() / ".cache/treadle", "float32")
    base = DecodeBase.load(folder, name=name, dtype=options.dtype)
    if not options.no_prepack:
        base.prepack()
    base.compile()
    parts: dict[str, Callable[[], list[Row]]] = {
        "throughput": lambda: _throughput(base, folder, options),
        "group": lambda: _group(base, options),
        "turns": lambda: _turns(base),
        "join": lambda: _join(base, options.rounds),
    }
    return [row for part in options.parts for row in parts[part]()]


def make_adapters(base: DecodeBase, count: int) -> list[AdapterWeights]:
    """Returns adapters of ranks 8 and 16 on the seven linears of every layer, in mid-training: B is not zero."""
    adapters = []
    for seed in range(count):
        config = LoraConfig(rank=(8, 16)[seed % 2], alpha=16.0, seed=seed, train_unembed=False)
        weights = AdapterWeights.init(base, config)
        generator = torch.Generator().manual_seed(seed)
        for tensor_name, tensor in weights.to_tensors().items():
            if "lora_B" in tensor_name:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.01)
        weights.refresh()
        adapters.append(weights)
    return adapters


class EngineSide:
    """The load on our engine; prefixes are not kept, so that a round does not profit from the one before."""

    def __init__(self, name: str, base: DecodeBase, load: Load, adapters: Sequence[AdapterWeights | None]) -> None:
        """Sample the load with the given adapters in the place of its own."""
        self.name = name
        self._decoder = Decoder(base, max_sequences=len(load.prompts), keep_prefixes=False)
        self._load, self._adapters = load, adapters

    def run(self) -> int:
        """Sample every request; return the number of new tokens."""
        params = [_params(self._load.new_tokens, seed) for seed in range(len(self._load.prompts))]
        for prompt, adapter, one in zip(self._load.prompts, self._load.adapter_of, params, strict=True):
            tokens_T = np.array(prompt, dtype=np.int32)
            self._decoder.add(SampleRequest(tokens_T, one, self._adapters[adapter]))
        before = self._decoder.num_tokens
        while self._decoder.has_work:
            self._decoder.step()
        return self._decoder.num_tokens - before


def _throughput(base: DecodeBase, folder: str, options: argparse.Namespace) -> list[Row]:
    rng = np.random.default_rng(0)
    lengths = rng.integers(24, 121, options.requests)
    prompts = tuple(tuple(rng.integers(3, base.info.vocab_size, length).tolist()) for length in lengths)
    owners = tuple(index % options.adapters for index in range(options.requests))
    load = Load(prompts, owners, options.tokens)
    adapters = make_adapters(base, options.adapters)
    held = PeftModel(folder, base.dtype, adapters)
    sides = [
        EngineSide(_MIXED, base, load, adapters),
        EngineSide(_BASE, base, load, [None] * options.adapters),
        PaddedGenerate(held, load),
        MixedGenerate(held, load),
    ]
    if "sequential" not in options.without:
        sides.append(SequentialGenerate(held, load))
    if "continuous" not in options.without:
        sides.append(ContinuousGenerate(held, load))
    total = options.requests * options.tokens
    times = _interleave(sides, options.rounds, total)
    what = f"{options.requests} requests, {options.adapters} adapters, {options.tokens} tokens each"
    rows = [
        {"figure": f"tokens/CPU s (wall): {side.name}", "value": f"{total / cpu:.1f} ({total / wall:.1f})"}
        for side in sides
        for cpu, wall in [np.median(np.array(times[side.name]), axis=0).tolist()]
    ]
    targets = {SequentialGenerate.name: "8", MixedGenerate.name: "2.5", PaddedGenerate.name: "1.0", _BASE: "0.75"}
    for side in sides[1:]:
        ratio = _ratio(times[side.name], times[_MIXED])
        rows.append({"figure": f"{what}: against {side.name}", "value": ratio, "target": targets.get(side.name, "")})
    return rows + (_vllm(options, folder, held, load, times) if options.vllm else [])


def _vllm(options: argparse.Namespace, folder: str, held: PeftModel, load: Load, times: Times) -> list[Row]:
    """Returns the rows of vLLM, in rounds of its own: it lives in another process and starts for minutes."""
    with tempfile.TemporaryDirectory() as saved:
        paths = held.save(Path(saved))
        rounds = run_vllm(options.vllm, folder, options.dtype, paths, load, options.rounds)
    rows = []
    for kind, side, target in (("lora", _MIXED, "1.5"), ("base", _BASE, "")):
        cpu, wall = (float(np.median([one[f"{kind}_{clock}"] for one in rounds])) for clock in ("cpu", "wall"))
        own = np.median(np.array(times[side]), axis=0)
        name = f"vLLM, {'mixed adapters' if kind == 'lora' else 'base alone'}"
        rows.append({"figure": f"{side}: against {name}", "value": f"{cpu / own[0]:.2f} (wall {wall / own[1]:.2f})"})
        rows[-1] |= {"target": target} if target else {}
    return rows


def _interleave(sides: Sequence[object], rounds: int, total: int) -> Times:
    """Run all sides in turn; return (CPU, wall) seconds of each round by side."""
    times: Times = {}
    for _ in range(rounds):
        for side in sides:
            cpu, wall = time.process_time(), time.perf_counter()
            if side.run() != total:  # type: ignore[attr-defined] - every side has it
                raise RuntimeError("a side did not draw the tokens that it was asked for")
            seconds = time.process_time() - cpu, time.perf_counter() - wall
            times.setdefault(side.name, []).append(seconds)  # type: ignore[attr-defined] - and this
    return times


def _ratio(theirs: Sequence[tuple[float, float]], ours: Sequence[tuple[float, float]]) -> str:
    cpu, wall = (float(np.median([a[i] / b[i] for a, b in zip(theirs, ours, strict=True)])) for i in (0, 1))
    return f"{cpu:.2f} (wall {wall:.2f})"


def _group(base: DecodeBase, options: argparse.Namespace) -> list[Row]:
    """Sixteen samples of one request against sixteen requests that share nothing, one at a time and all at once."""
    length = min(512, base.info.max_context - 32)
    prompt_T = np.random.default_rng(1).integers(3, base.info.vocab_size, length).astype(np.int32)
    params = _params(16, 1)

    def group(decoder: Decoder) -> None:
        _finish(decoder, [SampleRequest(prompt_T, params, num_samples=16)])

    def singles(decoder: Decoder) -> None:
        _finish(decoder, [SampleRequest(prompt_T, params) for _ in range(16)])

    ways: dict[str, tuple[Callable[[Decoder], None], bool]] = {
        "group": (group, False), "alone": (singles, False), "kept": (singles, True),
    }  # fmt: skip
    times: Times = {}
    for _ in range(max(1, options.rounds - 1)):
        for name, (way, keep) in ways.items():
            decoder = Decoder(base, keep_prefixes=keep)
            cpu, wall = time.process_time(), time.perf_counter()
            way(decoder)
            times.setdefault(name, []).append((time.process_time() - cpu, time.perf_counter() - wall))
    figure = f"num_samples=16 of a {length}-token prompt, 16 tokens each, against 16 requests"
    return [
        {"figure": figure, "value": _ratio(times["alone"], times["group"]), "target": "5"},
        {"figure": f"{figure} with kept prefixes", "value": _ratio(times["kept"], times["group"])},
    ]


def _turns(base: DecodeBase) -> list[Row]:
    """A chat whose prompt grows by 64 tokens a turn, 16 of which were drawn in the turn before."""
    decoder = Decoder(base)
    rng = np.random.default_rng(2)
    most = min(1024, base.info.max_context - 64)
    text_T = rng.integers(3, base.info.vocab_size, 64).astype(np.int32)
    sent = 0
    while len(text_T) <= most:
        sent += len(text_T)
        drawn = _finish(decoder, [SampleRequest(text_T, _params(16, len(text_T)))])
        fresh = rng.integers(3, base.info.vocab_size, 48).astype(np.int32)
        text_T = np.concatenate([text_T, np.array(drawn, dtype=np.int32), fresh])
    share = decoder.num_read / sent
    figure = f"prompts growing by 64 tokens to {most}: prefill tokens computed / sent"
    return [{"figure": figure, "value": f"{share:.3f}", "target": "0.2"}]


def _join(base: DecodeBase, rounds: int) -> list[Row]:
    """The time between two tokens of sixteen samples, alone and while a long prompt is read beside them, in turn."""
    decoder = Decoder(base)
    decoder.prepare()  # as a sampler does at its start
    rng = np.random.default_rng(3)
    length = min(1024, base.info.max_context - 16)
    for seed in range(16):
        tokens_T = rng.integers(3, base.info.vocab_size, 64).astype(np.int32)
        decoder.add(SampleRequest(tokens_T, _params(min(64 + 120 * rounds, base.info.max_context - 70), seed)))
    while decoder.num_tokens < 16 * 8:
        decoder.step()
    times = [_join_once(decoder, rng.integers(3, base.info.vocab_size, length).astype(np.int32)) for _ in range(rounds)]
    rows = []
    for place, unit in ((0, "CPU"), (1, "wall")):
        calm, busy = ([[one[place] for one in steps] for steps in side] for side in zip(*times, strict=True))
        p99 = float(np.median([_p99(one) for one in busy]))
        ratio = np.median([_p99(one) / _p99(alone) for one, alone in zip(busy, calm, strict=True)])
        median = np.median([np.median(one) / np.median(alone) for one, alone in zip(busy, calm, strict=True)])
        figure = f"p99 time between tokens ({unit}) while a {length}-token prompt joins 16 samples, against without"
        value = f"{ratio:.2f} ({p99 * 1e3:.0f} ms; median then {median:.2f}x)"
        rows.append({"figure": figure, "value": value, "target": "2"})
    return rows


def _join_once(decoder: Decoder, prompt_T: NDArray[np.int32]) -> tuple[list[tuple[float, float]], ...]:
    """Return (CPU, wall) seconds of 40 steps without the prompt, then of those that read it."""
    steady = [_seconds(decoder.step) for _ in range(40)]
    read = decoder.num_read
    number = decoder.add(SampleRequest(prompt_T, _params(4, 0)))
    joining = []
    while decoder.num_read < read + len(prompt_T):
        joining.append(_seconds(decoder.step))
    decoder.cancel(number)
    return steady, joining


def _p99(seconds: Sequence[float]) -> float:
    return float(np.quantile(seconds, 0.99))


def _seconds(function: Callable[[], object]) -> tuple[float, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    function()
    return time.process_time() - cpu, time.perf_counter() - wall


def _finish(decoder: Decoder, requests: Sequence[SampleRequest]) -> list[int]:
    """Run requests to their end; return the tokens of sample 0 of the first."""
    numbers = [decoder.add(request) for request in requests]
    tokens: list[int] = []
    while decoder.has_work:
        for event in decoder.step():
            if event.request == numbers[0] and getattr(event, "index", None) == 0:
                tokens.append(event.token)  # type: ignore[union-attr] - only token events have an index
    return tokens


def _params(max_tokens: int, seed: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, seed=seed, ignore_eos=True)
