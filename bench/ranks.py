"""A base over several ranks: what each holds, what a pass and a decoding step cost, and what moves between them.

Compared are the way that Treadle goes (`columns`: every linear and the embedding cut by output features, outputs
gathered), torch's FSDP2 (`fully_shard` on each layer: weights are gathered before a layer and dropped behind it) where
every rank computes all of the pass, and FSDP2 with the sequences divided over the ranks and the gradients of adapters
added up. One process on one thread is the yardstick. Each way is a group of its own, started by torchrun over gloo; the
ways take turns, and the figures are medians over turns. FSDP2's layers go through transformers' modules, so that
another row shows what that path costs on one rank. Bytes are what a rank receives, of FSDP2 by its weights.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from bench.workloads import MODELS, base_folder
from tests.support.cluster import free_port

Row = dict[str, Any]  # Any: JSON values

ONE = "1 rank"
GENERIC = "1 rank, transformers' modules"
GROUPS = {"columns": "columns", "FSDP2": "fsdp", "FSDP2, sequences divided": "fsdp data parallel"}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's options."""
    parser.add_argument("--model", default="smollm2", choices=MODELS)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="passes of each way in a turn")
    parser.add_argument("--turns", type=int, default=2)


def run(options: argparse.Namespace) -> list[Row]:
    """Runs all ways in turns and returns the rows."""
    ways = {ONE: (1, "columns", False), GENERIC: (1, "columns", True)}
    ways |= {f"{options.ranks} ranks, {name}": (options.ranks, way, False) for name, way in GROUPS.items()}
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as scratch:
        folder = base_folder(options.model, Path(scratch))
        for _ in range(options.turns):
            for name, (ranks, way, generic) in ways.items():
                turns[name].append(_measure(folder, ranks, way, generic, options))
    rows = [{"figure": f"weights held by a rank: {name}", "value": _mb(found[0]["weights"])}
            for name, found in turns.items()]  # fmt: skip
    rows += [{"figure": f"most memory that loading took: {name}", "value": _mb(min(one["loading"] for one in found))}
             for name, found in turns.items()]  # fmt: skip
    for what, title in (
        ("pass 2", "pass of 256 tokens"), ("pass 8", "pass of 1,024 tokens"), ("decode", "16 rows of decoding")
    ):  # fmt: skip
        base = _of(turns[ONE], what, "wall")
        for name, found in turns.items():
            wall, cpu = _of(found, what, "wall"), _of(found, what, "cpu")
            value = f"{wall:.1f} ms ({wall / base:.2f} times one rank), {cpu:.1f} ms of CPU per rank"
            moved = _moved(name, what, found)
            rows.append(
                {"figure": f"{title}: {name}", "value": value + (f", {moved:.1f} MB received" if moved else "")}
            )
    return rows


def _measure(folder: str, ranks: int, way: str, generic: bool, options: argparse.Namespace) -> dict[str, Any]:
    torchrun = [str(Path(sys.executable).with_name("torchrun")), f"--nproc-per-node={ranks}"]
    torchrun.append(f"--master-port={free_port()}")
    command = [*(torchrun if ranks > 1 else [sys.executable])]
    command += ["--module" if ranks > 1 else "-m", "bench.rank_side", way, "--base", folder]
    command += ["--dtype", options.dtype, "--rounds", str(options.rounds), "--threads", "1"]
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command + ["--generic"] * generic, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _of(found: list[dict[str, Any]], what: str, figure: str) -> float:
    return median(one[what][figure] for one in found)


def _moved(name: str, what: str, found: list[dict[str, Any]]) -> float:
    """Returns the megabytes that a rank receives; FSDP2 gathers what others hold before forward and backward."""
    own = _of(found, what, "megabytes")
    if "FSDP2" not in name:
        return own
    return own + found[0]["gathered"] / 1e6 * (1 if what == "decode" else 2)


def _mb(value: float) -> str:
    return f"{value / 1e6:.0f} MB"
