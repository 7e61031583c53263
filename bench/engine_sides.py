"""The engine's own sides of the training benchmark: merged passes, one tenant at a time, and the base alone.

Passes are filled in the tenants' order up to the engine's token budget. The base alone is the limit: the same
forward, head and input gradient over the same tokens, by an adapter that has no site, so that no LoRA is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bench.workloads import Tenant, joined
from treadle_engine.base_model import BaseModel
from treadle_engine.lora import AdapterWeights, LoraConfig, LoraSite
from treadle_engine.losses import LossSpec
from treadle_engine.optim import TrainState
from treadle_engine.passes import Chunk, TrainingEngine

MERGED, LIMIT = "engine, merged", "base alone (the limit)"
"""Names of the two sides whose ratio is the engine's share of the limit."""

_LOSS = LossSpec("cross_entropy")


@dataclass(frozen=True)
class _NoSites:
    """A base to whose linears nothing may be attached."""

    dtype: torch.dtype
    device: torch.device

    def lora_sites(self, config: LoraConfig) -> tuple[LoraSite, ...]:
        return ()


class EngineSide:
    """Runs every group of tenants as passes of its own and adds gradients to their states."""

    def __init__(self, name: str, engine: TrainingEngine, groups: Sequence[Sequence[Tenant]]) -> None:
        """Cut every batch into chunks and fill passes within each group."""
        self.name = name
        self._engine = engine
        self._states = [tenant.state for group in groups for tenant in group]
        self._passes: list[list[Chunk]] = []
        for group in groups:
            self._passes.append([])
            room = engine.max_tokens_per_pass
            for tenant in group:
                for piece in engine.split(tenant.batch):
                    if piece.num_tokens > room:
                        self._passes.append([])
                        room = engine.max_tokens_per_pass
                    self._passes[-1].append(Chunk(tenant.state, piece, _LOSS))
                    room -= piece.num_tokens

    def step(self) -> float:
        """Run all passes; return the summed loss."""
        total = 0.0
        for chunks in self._passes:
            for result in self._engine.run_pass(chunks):
                if result.error is not None:
                    raise result.error
                total += result.loss_sum
        return total

    def clear(self) -> None:
        """Drop the gradients."""
        for state in self._states:
            state.clear_gradient()


def merged(engine: TrainingEngine, tenants: Sequence[Tenant]) -> EngineSide:
    """Return the engine with all tenants sharing passes."""
    return EngineSide(MERGED, engine, [tenants])


def one_by_one(engine: TrainingEngine, tenants: Sequence[Tenant]) -> EngineSide:
    """Return the engine with every tenant in passes of its own."""
    return EngineSide("engine, one tenant at a time", engine, [[tenant] for tenant in tenants])


def base_alone(base: BaseModel, engine: TrainingEngine, tenants: Sequence[Tenant]) -> EngineSide:
    """Return the limit: forward and input gradient of the base over the same tokens, as if they were one tenant's."""
    weights = AdapterWeights(_NoSites(base.dtype, base.device), LoraConfig(rank=1))
    state = TrainState.fresh(weights)
    batch = joined([tenant.batch for tenant in tenants])
    return EngineSide(LIMIT, engine, [[Tenant(state, batch)]])
