"""Tells whether two processes compute alike: what bits depend on, and what a fixed batch gives.

Equal texts mean that a chunk has the same bits in either process, as far as one may say so without computing it in
both: the same libraries on the same kind of processor with as many threads, and the same outputs and gradient of two
sequences over the base's own weights. Knows nothing of who asks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
import torch
import xxhash

from treadle_engine.base_model import BaseModel
from treadle_engine.batch import TokenBatch
from treadle_engine.grouped_gemm import available
from treadle_engine.lora import AdapterWeights, LoraConfig
from treadle_engine.losses import LossSpec
from treadle_engine.passes import Chunk, TrainingEngine

_LENGTHS: Final = (48, 208)
"""Rows enough for products to go the ways that they go in a chunk; a pass of a quarter of one."""


def numerics(base: BaseModel) -> str:
    """Return what the bits of passes over `base` depend on, in one line; runs a pass, so its thread must be the base's.

    Where the fixed batch gives no finite result the line says so; it then equals that of every such base.
    """
    device = base.device
    kind = _processor() if device.type == "cpu" else torch.cuda.get_device_name(device)
    facts = (
        f"torch {torch.__version__}",
        str(base.info.dtype),
        f"{device.type} {kind}",
        torch.backends.cpu.get_cpu_capability(),
        f"{torch.get_num_threads()} threads",
        f"small products {'grouped' if device.type == 'cpu' and available() else 'one by one'}",
        f"{1 if base.shard is None else base.shard.size} ranks",
        f"probe {_probe(base)}",
    )
    return ", ".join(facts)


def _processor() -> str:
    """Return the model of the processor: libraries choose kernels and the sizes of their blocks by it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown"
    named = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = ("vendor_id\t", "cpu family\t", "model\t\t", "stepping\t")
    return "/".join(named.get(field, "").strip() for field in fields)


def _probe(base: BaseModel) -> str:
    """Return the xxh3-64 of log-probs and gradient of a fixed batch."""
    weights = AdapterWeights.init(base, LoraConfig(rank=8, alpha=16.0, seed=1))
    # As drawn, B is zero and A gets no gradient.
    weights.flat.add_(0.01)
    weights.refresh()
    total = sum(_LENGTHS)
    tokens_T = ((np.arange(total) * 7919) % base.info.vocab_size).astype(np.int32)
    batch = TokenBatch(
        np.array(_LENGTHS, np.int64), tokens_T, np.roll(tokens_T, -1), {"weights": np.ones(total, np.float32)}
    )
    state = TrainingEngine.apart(weights)
    (result,) = TrainingEngine(base).run_pass([Chunk(state, batch, LossSpec("cross_entropy"))])
    if result.error is not None:
        return result.error.reason
    digest = xxhash.xxh3_64(result.logprobs_TK.tobytes())
    digest.update(state.grads.cpu().numpy().data)
    return digest.hexdigest()
