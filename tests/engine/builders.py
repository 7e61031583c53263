"""Batches and training states for the engine's tests, each a function of its seed."""

from __future__ import annotations

import numpy as np
import torch

from treadle_engine.base_model import BaseModel
from treadle_engine.batch import TokenBatch
from treadle_engine.lora import AdapterWeights, LoraConfig
from treadle_engine.optim import TrainState


def make_batch(lengths: list[int], seed: int, vocab: int, loss: str = "cross_entropy") -> TokenBatch:
    """Return random sequences with the inputs of a loss; some weights are zero, some targets absent."""
    rng = np.random.default_rng(seed)
    total = sum(lengths)
    tokens = rng.integers(0, vocab, total).astype(np.int32)
    targets = rng.integers(0, vocab, total).astype(np.int32)
    targets[rng.random(total) < 0.1] = -1
    columns: dict[str, np.ndarray] = {}
    if loss == "cross_entropy":
        columns["weights"] = (rng.random(total) * (rng.random(total) < 0.7)).astype(np.float32)
    else:
        columns["logprobs"] = -(rng.random(total) * 9).astype(np.float32)
        columns["advantages"] = rng.normal(size=total).astype(np.float32)
    if loss == "gspo":
        columns["sequence_ratio_mask"] = (rng.random(total) < 0.8).astype(np.float32)
    return TokenBatch(np.array(lengths, dtype=np.int64), tokens, targets, columns)


def make_state(base: BaseModel, rank: int = 4, seed: int = 0, **kinds: bool) -> TrainState:
    """Return a run in mid-training: B is not zero any more."""
    weights = AdapterWeights.init(base, LoraConfig(rank=rank, alpha=16.0, seed=seed, **kinds))
    generator = torch.Generator().manual_seed(seed + 1)
    for tensor in weights.to_tensors().values():
        tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.02)
    weights.refresh()
    return TrainState.fresh(weights)
