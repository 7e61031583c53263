"""Peak memory of one training step, each side in a process of its own (Linux).

`python -m bench.peak_memory SIDE MODEL WORKLOAD SCRATCH` loads the side, runs a small step so that libraries have
what they keep, hands freed memory back, resets the kernel's high-water mark, runs the step, and prints how many
bytes the mark rose above what was resident before.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from bench.baselines import PeftSequential
from bench.engine_sides import merged
from bench.workloads import Tenant, base_folder, make_batch, make_tenants
from treadle_engine.base_model import BaseModel
from treadle_engine.passes import TrainingEngine

SIDES = ("peft", "engine", "engine-one-pass")
"""Sides that are compared with PEFT; `engine-checkpointed` is compared with `engine` (`bench.memory`)."""


def measure(side: str, model: str, workload: str, scratch: Path) -> int:
    """Return the bytes by which a step raises the resident memory of a fresh process."""
    command = [sys.executable, "-m", "bench.peak_memory", side, model, workload, str(scratch)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def _prepare(side: str, model: str, workload: str, scratch: Path) -> Callable[[], float]:
    """Return the step of a side, warm."""
    folder = base_folder(model, scratch)
    base = BaseModel.load(folder, dtype="float32")
    tenants = make_tenants(base, workload)
    tiny = make_batch([16], base.info.vocab_size, np.random.default_rng(1))
    small = [Tenant(tenant.state, tiny) for tenant in tenants]
    if side == "peft":
        del base
        PeftSequential(folder, torch.float32, small).step()
        return PeftSequential(folder, torch.float32, tenants).step
    base.checkpoint_activations = side == "engine-checkpointed"
    budget = sum(tenant.batch.num_tokens for tenant in tenants)
    engine = TrainingEngine(base, budget) if side == "engine-one-pass" else TrainingEngine(base)
    merged(engine, small).step()
    return merged(engine, tenants).step


def _status(field: str) -> int:
    """Return a memory field of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1]) * 1024


def main() -> None:
    """Measure one side in this process."""
    side, model, workload, scratch = sys.argv[1:]
    torch.set_num_threads(1)
    step = _prepare(side, model, workload, Path(scratch))
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    step()
    print(_status("VmHWM") - before)


if __name__ == "__main__":
    main()
