"""Seeded data and random bases for the engine's benchmarks: who trains, on how many tokens, with which rank.

A workload is a list of tenants with the lengths of their sequences. It does not know who computes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from treadle_engine.base_model import BaseModel
from treadle_engine.bases import resolve
from treadle_engine.batch import TokenBatch
from treadle_engine.lora import AdapterWeights, LoraConfig
from treadle_engine.optim import TrainState

MIXED_RANKS = (4, 8, 16, 32)
"""Ranks of the tenants of a workload with several, in turn."""

RANK = 8
"""Rank where there is one tenant."""

WORKLOADS = {
    "a": "1 tenant, 4 x 64-256 tokens",
    "b4": "4 tenants, 4 x 64-256 tokens each",
    "b16": "16 tenants, 4 x 64-256 tokens each",
    "c": "64 tenants, 1 x 12-40 tokens each",
    "d": "1 tenant, 16 x 512 tokens",
}
"""Workloads by name."""

_SIZES = {"small": (256, 4, 4096), "medium": (512, 8, 8192), "medium32k": (512, 8, 32768)}
MODELS = (*_SIZES, "smollm2")
"""Bases by name: random ones of hidden size, layers and vocabulary as listed, and SmolLM2-135M."""


@dataclass(frozen=True)
class Tenant:
    """One tenant's adapter and its batch: every position has a target and weight 1."""

    state: TrainState
    batch: TokenBatch


def base_folder(model: str, scratch: Path) -> str:
    """Return the folder of a base; random ones are written into `scratch` on first use."""
    if model == "smollm2":
        return resolve("smollm2", Path.home() / ".cache/treadle", "float32")[0]
    folder = scratch / model
    if not folder.exists():
        hidden, layers, vocabulary = _SIZES[model]
        config = Qwen3Config(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 64,
            num_key_value_heads=hidden // 128,
            head_dim=64,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
        )
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


def make_tenants(base: BaseModel, workload: str) -> list[Tenant]:
    """Return the tenants of a workload on a base; the same data and adapters on every call."""
    rng = np.random.default_rng(0)
    lengths = _lengths(workload, rng)
    ranks = [RANK] if len(lengths) == 1 else [MIXED_RANKS[index % len(MIXED_RANKS)] for index in range(len(lengths))]
    return [
        Tenant(make_state(base, rank, seed), make_batch(own, base.info.vocab_size, rng))
        for seed, (own, rank) in enumerate(zip(lengths, ranks, strict=True))
    ]


def make_batch(lengths: Sequence[int], vocabulary: int, rng: np.random.Generator) -> TokenBatch:
    """Return random sequences of the given lengths, each position with its successor as target and weight 1."""
    rows = [rng.integers(3, vocabulary, length + 1).astype(np.int32) for length in lengths]
    return TokenBatch(
        lengths_R=np.array(lengths, dtype=np.int64),
        tokens_T=np.concatenate([row[:-1] for row in rows]),
        targets_TK=np.concatenate([row[1:] for row in rows]),
        columns={"weights": np.ones(sum(lengths), dtype=np.float32)},
    )


def joined(batches: Sequence[TokenBatch]) -> TokenBatch:
    """Return the sequences of all batches as one batch."""
    return TokenBatch(
        lengths_R=np.concatenate([batch.lengths_R for batch in batches]),
        tokens_T=np.concatenate([batch.tokens_T for batch in batches]),
        targets_TK=np.concatenate([batch.targets_TK for batch in batches]),
        columns={"weights": np.concatenate([batch.columns["weights"] for batch in batches])},
    )


def make_state(base: BaseModel, rank: int, seed: int) -> TrainState:
    """Return an adapter on the seven linears of every layer, in mid-training: B is not zero."""
    weights = AdapterWeights.init(base, LoraConfig(rank=rank, alpha=16.0, seed=seed, train_unembed=False))
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in weights.to_tensors().items():
        if "lora_B" in name:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.01)
    weights.refresh()
    return TrainState.fresh(weights)


def _lengths(workload: str, rng: np.random.Generator) -> list[list[int]]:
    if workload == "d":
        return [[512] * 16]
    if workload == "c":
        return [[int(length)] for length in rng.integers(12, 41, 64)]
    tenants = {"a": 1, "b4": 4, "b16": 16}[workload]
    return [[int(length) for length in rng.integers(64, 257, 4)] for _ in range(tenants)]
