"""The training engine against PEFT one tenant after the other, a padded batch of all tenants, and the base alone.

All sides run in one process on the same bases, adapters and tokens, in interleaved rounds: a step is forward and
backward with gradients for A and B alone. Figures are medians over rounds of ratios within a round; CPU seconds are
the ones to trust on a shared machine. Every side's loss is compared before anything is timed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import torch
from transformers.utils.logging import disable_progress_bar

from bench import peak_memory
from bench.baselines import PaddedBmm, PeftSequential
from bench.engine_sides import LIMIT, MERGED, base_alone, merged, one_by_one
from bench.workloads import MODELS, WORKLOADS, Tenant, base_folder, make_state, make_tenants
from treadle_engine.base_model import BaseModel
from treadle_engine.optim import AdamParams, optim_step
from treadle_engine.passes import TrainingEngine

Row = dict[str, Any]  # Any: JSON values; figure, value and target are strings, the rest numbers

SPEED = {"a": (1.9, 1.6), "b16": (2.0, 1.6), "c": (5.0, 5.0)}
"""Least throughput against sequential PEFT per CPU second, on random bases and on SmolLM2."""
WALL_C = 8.0
"""The same for (c) in wall seconds."""
SHARE = {"b4": 0.88, "b16": 0.88, "d": 0.88, "c": 0.45}
"""Least share of what the base alone reaches."""
PEAK_MEMORY = 0.5
"""Most peak memory of a step against PEFT."""
OPTIM_STEP = 1.0
"""Least speed of optim_step against AdamW."""


class Side(Protocol):
    """One way of computing a step for all tenants."""

    name: str

    def step(self) -> float:
        """Run forward and backward; return the summed loss."""
        ...

    def clear(self) -> None:
        """Drop the gradients."""
        ...


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's options."""
    extras = ("memory", "optim")
    parser.add_argument("--workloads", nargs="+", default=["a", "b16", "c", "d"], choices=WORKLOADS)
    parser.add_argument("--models", nargs="+", default=["small", "medium"], choices=MODELS)
    parser.add_argument("--extras", nargs="*", default=list(extras), choices=extras, help="single figures to add")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each side")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--dtype", default="auto", help="element type of the base; auto: bfloat16 where it is native")
    parser.add_argument("--only", nargs="+", default=[], help="only sides whose name contains one of these; peft stays")


def run(options: argparse.Namespace) -> list[Row]:
    """Measures every workload on every model and returns the rows."""
    torch.set_num_threads(options.threads)
    disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    rows: list[Row] = []
    for part in _parts(options):
        for row in part:
            print(f"{row['figure']}: {row['value']}", file=sys.stderr, flush=True)
        rows += part
    return rows


def _parts(options: argparse.Namespace) -> Iterator[list[Row]]:
    """Yield rows as they are measured, so that a long run shows where it is."""
    with tempfile.TemporaryDirectory() as scratch:
        for model in options.models:
            folder = base_folder(model, Path(scratch))
            base = BaseModel.load(folder, dtype=options.dtype)
            for workload in options.workloads:
                yield compare(model, workload, folder, base, options)
        if "memory" in options.extras:
            yield memory_rows(Path(scratch))
        if "optim" in options.extras:
            base = BaseModel.load(base_folder("medium", Path(scratch)), dtype="float32")
            yield optimizer_rows(base, options.rounds)


def compare(model: str, workload: str, folder: str, base: BaseModel, options: argparse.Namespace) -> list[Row]:
    """Measures one workload on one model, all sides interleaved."""
    tenants = make_tenants(base, workload)
    engine = TrainingEngine(base)
    peft = PeftSequential(folder, base.dtype, tenants)
    sides: list[Side] = [peft, merged(engine, tenants), base_alone(base, engine, tenants)]
    if len(tenants) > 1:
        sides.append(one_by_one(engine, tenants))
        sides.append(PaddedBmm(folder, base.dtype, tenants, engine.max_tokens_per_pass))
    if options.only:
        sides = [side for side in sides if side is peft or any(part in side.name for part in options.only)]
    # The warm-up round also shows that all sides compute the same thing.
    losses = {side.name: _loss(side) for side in sides}
    for name, loss in losses.items():
        if "limit" not in name and abs(loss - losses[peft.name]) > 5e-3 * abs(losses[peft.name]):
            raise RuntimeError(f"{model} ({workload}): {name} has loss {loss}, PEFT has {losses[peft.name]}")
    times = _rounds(sides, options.rounds)
    tokens = sum(tenant.batch.num_tokens for tenant in tenants)
    print(f"{model} ({workload}): {WORKLOADS[workload]}", file=sys.stderr, flush=True)
    title = f"{model} ({workload})"
    rows = _speed_rows(title, tokens, times, SPEED[workload][model == "smollm2"] if workload in SPEED else None)
    return rows + _share_rows(title, workload, times) + _switch_rows(title, peft, tenants, times)


def _loss(side: Side) -> float:
    loss = side.step()
    side.clear()
    return loss


def _rounds(sides: Sequence[Side], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Return (CPU seconds, wall seconds) per side and round; the sides take turns within each round."""
    times: dict[str, list[tuple[float, float]]] = {side.name: [] for side in sides}
    for index in range(rounds):
        for side in sides if index % 2 == 0 else reversed(sides):
            cpu, wall = time.process_time(), time.perf_counter()
            side.step()
            times[side.name].append((time.process_time() - cpu, time.perf_counter() - wall))
            side.clear()
    return times


def _speed_rows(
    title: str, tokens: int, times: Mapping[str, list[tuple[float, float]]], least: float | None
) -> list[Row]:
    """Return every side's throughput as a multiple of PEFT's."""
    rows: list[Row] = []
    for name, own in times.items():
        cpu, wall = (_ratio(times[PeftSequential.name], own, which) for which in (0, 1))
        speed = tokens / median(seconds for seconds, _ in own)
        value = f"{cpu:.2f}x CPU, {wall:.2f}x wall, {speed:.0f} tokens per CPU s"
        row: Row = {"figure": f"{title}: {name}", "value": value, "cpu": cpu, "wall": wall, "tokens_per_cpu_s": speed}
        if name == MERGED and least is not None:
            row |= _target(f">= {least}x CPU", cpu >= least)
        rows.append(row)
        if name == MERGED and title.endswith("(c)"):
            row = {"figure": f"{title}: {name}, wall", "value": f"{wall:.2f}x", "wall": wall}
            rows.append(row | _target(f">= {WALL_C}x wall", wall >= WALL_C))
    return rows


def _share_rows(title: str, workload: str, times: Mapping[str, list[tuple[float, float]]]) -> list[Row]:
    """Return how much of the base alone's throughput the merged engine reaches."""
    if MERGED not in times or LIMIT not in times:
        return []
    share = _ratio(times[LIMIT], times[MERGED], 0)
    row: Row = {"figure": f"{title}: share of the limit", "value": f"{share:.2f}", "share": share}
    return [row | (_target(f">= {SHARE[workload]}", share >= SHARE[workload]) if workload in SHARE else {})]


def _switch_rows(
    title: str, peft: PeftSequential, tenants: Sequence[Tenant], times: Mapping[str, list[tuple[float, float]]]
) -> list[Row]:
    """Say how much of PEFT's time goes into set_adapter, which grows with the number of resident adapters."""
    if len(tenants) == 1 or MERGED not in times:
        return []
    cpu = time.process_time()
    for index in range(len(tenants)):
        peft.switch(index)
    switching = time.process_time() - cpu
    share = switching / median(seconds for seconds, _ in times[peft.name])
    rest = _ratio([(seconds - switching, 0.0) for seconds, _ in times[peft.name]], times[MERGED], 0)
    value = f"{share:.2f} (without it: {rest:.2f}x CPU)"
    return [{"figure": f"{title}: set_adapter's share of peft", "value": value, "share": share, "cpu_without": rest}]


def _target(text: str, reached: bool) -> Row:
    return {"target": f"{text}: {'reached' if reached else 'missed'}", "reached": reached}


def _ratio(slow: Sequence[tuple[float, float]], fast: Sequence[tuple[float, float]], which: int) -> float:
    return median(a[which] / b[which] for a, b in zip(slow, fast, strict=True))


def memory_rows(scratch: Path) -> list[Row]:
    """Compares the peak memory of a step at (d) with a vocabulary of 32,768."""
    base_folder("medium32k", scratch)
    peak = {side: peak_memory.measure(side, "medium32k", "d", scratch) for side in peak_memory.SIDES}
    rows: list[Row] = []
    for side, note in (("engine", "passes of at most 4096 tokens"), ("engine-one-pass", "all 8192 tokens in one pass")):
        share = peak[side] / peak["peft"]
        value = f"{share:.2f} of peft ({peak[side] / 2**20:.0f} of {peak['peft'] / 2**20:.0f} MiB, rise of RSS)"
        figure = f"medium32k (d): peak memory of a step, {note}"
        rows.append(
            {"figure": figure, "value": value, "share": share} | _target(f"<= {PEAK_MEMORY}", share <= PEAK_MEMORY)
        )
    return rows


def optimizer_rows(base: BaseModel, rounds: int) -> list[Row]:
    """Compares optim_step of a 10 M-parameter adapter with torch's fused AdamW on the same tensors."""
    state = make_state(base, rank=128, seed=0)
    theirs = [torch.nn.Parameter(tensor.clone()) for tensor in state.weights.to_tensors().values()]
    count = sum(parameter.numel() for parameter in theirs)
    adam = torch.optim.AdamW(theirs, lr=1e-4, fused=True)
    gradient = torch.randn(state.grads.shape) * 1e-3
    pairs = [pair for pair in state.weights.layout.pairs(gradient) if pair is not None]
    for parameter, copied in zip(theirs, [tensor for pair in pairs for tensor in pair], strict=True):
        parameter.grad = copied.clone()

    def clipped() -> None:
        torch.nn.utils.clip_grad_norm_(theirs, 1e9, foreach=True)
        adam.step()
        adam.zero_grad(set_to_none=False)

    def ours() -> None:
        optim_step(state, AdamParams())

    variants: list[tuple[str, Callable[[], Any]]] = [
        ("AdamW(fused=True).step() alone", adam.step),
        ("AdamW with clip_grad_norm_ and zero_grad", clipped),
    ]
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name, _ in [*variants, ("ours", ours)]}
    for index in range(4 * rounds + 1):
        for name, step in [*variants, ("ours", ours)]:
            state.grads.copy_(gradient)
            cpu, wall = time.process_time(), time.perf_counter()
            step()
            if index:  # The first creates the moments.
                seconds[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    rows: list[Row] = []
    for name, _ in variants:
        ratio, own = _ratio(seconds[name], seconds["ours"], 0), median(cpu for cpu, _ in seconds["ours"])
        value = f"{ratio:.2f}x its speed ({1e3 * own:.1f} ms CPU, gradient norm, update norm and zeroing included)"
        figure = f"optim_step of {count / 1e6:.1f} M parameters against {name}"
        rows.append(
            {"figure": figure, "value": value, "cpu": ratio} | _target(f">= {OPTIM_STEP}x", ratio >= OPTIM_STEP)
        )
    return rows
