"""What a base takes in each precision, and what unpacking and checkpointed activations cost in time.

Bytes are those of the weights that a worker holds. Steps of all variants are interleaved in one process on one thread,
a step being forward and backward with gradients for A and B alone; ratios are medians over rounds, in CPU seconds.
Peaks are measured in processes of their own (`bench.peak_memory`).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from bench import peak_memory
from bench.engine_sides import EngineSide, merged
from bench.workloads import MODELS, base_folder, make_tenants
from treadle_engine.base_model import BaseModel
from treadle_engine.passes import TrainingEngine

Row = dict[str, Any]  # Any: JSON values

VARIANTS = {
    "float32": ("float32", "none", False),
    "float32, checkpointed": ("float32", "none", True),
    "float32 computing over int8": ("float32", "int8", False),
    "float32 computing over nf4": ("float32", "nf4", False),
    "bfloat16": ("bfloat16", "none", False),
    "bfloat16 computing over int8": ("bfloat16", "int8", False),
    "bfloat16 computing over nf4": ("bfloat16", "nf4", False),
}
"""Element type, quantization and checkpointing by name; the first is what the others are compared with."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's options."""
    parser.add_argument("--model", default="smollm2", choices=MODELS)
    parser.add_argument("--workload", default="a", help="workload whose step is timed")
    parser.add_argument("--peak-model", default="medium32k", choices=MODELS, help="base of the peak of a step at (d)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each variant")
    parser.add_argument("--timed", nargs="*", default=["float32"], help="element types whose variants are timed")


def run(options: argparse.Namespace) -> list[Row]:
    """Measures bytes, step times and peaks and returns the rows."""
    torch.set_num_threads(1)
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        folder = base_folder(options.model, Path(scratch))
        rows = _byte_rows(options.model, folder)
        rows += _time_rows(options, folder)
        return rows + _peak_rows(options.peak_model, Path(scratch))


def _byte_rows(model: str, folder: str) -> list[Row]:
    rows: list[Row] = []
    full = 0
    for name, (dtype, quantize, checkpointed) in VARIANTS.items():
        if checkpointed:
            continue
        base = BaseModel.load(folder, dtype=dtype, quantize=quantize)
        full = full or base.num_bytes
        linears = sum(site.in_features * site.out_features for site in base.sites[:-1]) / base.info.num_parameters
        value = f"{base.num_bytes / 2**20:.0f} MiB ({base.num_bytes / full:.2f} of float32)"
        rows.append({"figure": f"{model}: weights, {name}", "value": value, "bytes": base.num_bytes})
    rows.append({"figure": f"{model}: share of the parameters that is packed", "value": f"{linears:.2f}"})
    return rows


def _side(folder: str, name: str, workload: str) -> EngineSide:
    dtype, quantize, checkpointed = VARIANTS[name]
    base = BaseModel.load(folder, dtype=dtype, quantize=quantize)
    base.checkpoint_activations = checkpointed
    return merged(TrainingEngine(base), make_tenants(base, workload))


def _time_rows(options: argparse.Namespace, folder: str) -> list[Row]:
    names = [name for name, variant in VARIANTS.items() if variant[0] in options.timed]
    sides = {name: _side(folder, name, options.workload) for name in names}
    losses = {name: side.step() for name, side in sides.items()}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for index in range(options.rounds):
        for name in names if index % 2 == 0 else names[::-1]:
            sides[name].clear()
            began = time.process_time()
            sides[name].step()
            seconds[name].append(time.process_time() - began)
    rows: list[Row] = []
    for name in names:
        # Against the same element type unpacked: a processor without bfloat16 emulates it.
        plain = seconds[VARIANTS[name][0]]
        ratio = median(own / other for own, other in zip(seconds[name], plain, strict=True))
        value = f"{ratio:.2f} of {VARIANTS[name][0]} ({median(seconds[name]):.2f} s CPU, loss {losses[name]:.1f})"
        rows.append({"figure": f"{options.model} ({options.workload}): a step, {name}", "value": value, "ratio": ratio})
    return rows


def _peak_rows(model: str, scratch: Path) -> list[Row]:
    base_folder(model, scratch)
    peaks = {side: peak_memory.measure(side, model, "d", scratch) for side in ("engine", "engine-checkpointed")}
    share = peaks["engine-checkpointed"] / peaks["engine"]
    value = f"{share:.2f} of without ({' of '.join(f'{peaks[s] / 2**20:.0f}' for s in reversed(list(peaks)))} MiB)"
    return [{"figure": f"{model} (d): peak of a step with checkpointed activations", "value": value, "share": share}]
