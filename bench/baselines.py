"""What others do with the same adapters and data: PEFT one tenant after the other, and all tenants in one padded batch.

Each baseline takes copies of the tenants' adapters and computes the same summed cross-entropy and the gradient of A
and B alone. They share no code with the engine.
"""

# Shape suffix legend
#   S = sequences of a batch, L = longest sequence, N = tenants, R = rank
#   I = in features, O = out features, V = vocabulary

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import peft
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from bench.workloads import Tenant, joined
from treadle_engine.batch import TokenBatch

_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class PeftSequential:
    """The usual way: one model with every tenant's adapter, `set_adapter`, a padded batch, one tenant at a time."""

    name = "peft, one tenant at a time"

    def __init__(self, folder: str, dtype: torch.dtype, tenants: Sequence[Tenant]) -> None:
        """Load the base and give it a copy of every tenant's adapter."""
        model = _load(folder, dtype)
        for index, tenant in enumerate(tenants):
            config = tenant.state.weights.config
            lora = peft.LoraConfig(r=config.rank, lora_alpha=int(config.alpha), target_modules=_LINEARS)
            if index == 0:
                self._model = peft.get_peft_model(model, lora, adapter_name="tenant0")
            else:
                self._model.add_adapter(f"tenant{index}", lora)
        parameters = dict(self._model.named_parameters())
        for index, tenant in enumerate(tenants):
            for name, tensor in tenant.state.weights.to_tensors().items():
                key = f"base_model.model.{name.removesuffix('.weight')}.tenant{index}.weight"
                parameters[key].data.copy_(tensor)
        self._batches = [_padded(tenant.batch) for tenant in tenants]

    def step(self) -> float:
        """Run forward and backward of every tenant; return the summed loss."""
        total = 0.0
        for index, batch in enumerate(self._batches):
            self.switch(index)
            total += _step(self._model, batch)
        return total

    def switch(self, tenant: int) -> None:
        """Make a tenant's adapter the active one."""
        self._model.set_adapter(f"tenant{tenant}")

    def clear(self) -> None:
        """Drop the gradients."""
        self._model.zero_grad(set_to_none=True)


class PaddedBmm:
    """All tenants in one padded batch: each row gathers its A and B, ranks padded to the largest.

    A batch is cut between tenants so that it has at most `max_tokens` padded positions, as an engine's pass is.
    """

    name = "padded bmm, all tenants"

    def __init__(self, folder: str, dtype: torch.dtype, tenants: Sequence[Tenant], max_tokens: int) -> None:
        """Load the base and stack the tenants' adapters at every linear."""
        self._model = _load(folder, dtype)
        self._linears: list[_GatheredLora] = []
        for name, linear in list(self._model.named_modules()):
            if isinstance(linear, nn.Linear) and name.rsplit(".", 1)[-1] in _LINEARS:
                gathered = _GatheredLora(linear, name, tenants)
                self._model.set_submodule(name, gathered)
                self._linears.append(gathered)
        self._groups = [
            (_padded(joined([tenants[index].batch for index in group])), _owners(tenants, group))
            for group in _groups(tenants, max_tokens)
        ]

    def step(self) -> float:
        """Run forward and backward of all tenants; return the summed loss."""
        total = 0.0
        for batch, owner_S in self._groups:
            for linear in self._linears:
                linear.owner_S = owner_S
            total += _step(self._model, batch)
        return total

    def clear(self) -> None:
        """Drop the gradients."""
        self._model.zero_grad(set_to_none=True)


class _GatheredLora(nn.Module):
    """A frozen linear plus, for each row of the batch, the A and B of the tenant that owns it."""

    def __init__(self, linear: nn.Linear, name: str, tenants: Sequence[Tenant]) -> None:
        super().__init__()
        self.linear = linear
        rank = max(tenant.state.weights.config.rank for tenant in tenants)
        a_NRI = torch.zeros(len(tenants), rank, linear.in_features)
        b_NOR = torch.zeros(len(tenants), linear.out_features, rank)
        for index, tenant in enumerate(tenants):
            tensors, own = tenant.state.weights.to_tensors(), tenant.state.weights.config
            a_NRI[index, : own.rank] = tensors[f"{name}.lora_A.weight"]
            b_NOR[index, :, : own.rank] = tensors[f"{name}.lora_B.weight"] * own.scale
        self.a_NRI = nn.Parameter(a_NRI.to(linear.weight.dtype))
        self.b_NOR = nn.Parameter(b_NOR.to(linear.weight.dtype))
        self.owner_S = torch.zeros(0, dtype=torch.int64)

    def forward(self, x_SLI: Tensor) -> Tensor:
        low_SLR = torch.bmm(x_SLI, self.a_NRI[self.owner_S].transpose(1, 2))
        y_SLO: Tensor = self.linear(x_SLI)
        return y_SLO + torch.bmm(low_SLR, self.b_NOR[self.owner_S].transpose(1, 2))


def _load(folder: str, dtype: torch.dtype) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.requires_grad_(False)


def _padded(batch: TokenBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens, attention mask and targets [S, L]; -100 where there is no target, as PyTorch has it."""
    shape = (batch.num_rows, int(batch.lengths_R.max()))
    tokens_SL, targets_SL = torch.zeros(shape, dtype=torch.int64), torch.full(shape, -100, dtype=torch.int64)
    mask_SL = torch.zeros(shape, dtype=torch.int64)
    starts = np.cumsum(batch.lengths_R) - batch.lengths_R
    for row, (start, length) in enumerate(zip(starts.tolist(), batch.lengths_R.tolist(), strict=True)):
        tokens_SL[row, :length] = torch.from_numpy(batch.tokens_T[start : start + length])
        targets_SL[row, :length] = torch.from_numpy(batch.targets_TK[start : start + length])
        mask_SL[row, :length] = 1
    return tokens_SL, mask_SL, targets_SL


def _step(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> float:
    tokens_SL, mask_SL, targets_SL = batch
    logits_SLV = model(input_ids=tokens_SL, attention_mask=mask_SL, use_cache=False).logits
    loss = F.cross_entropy(logits_SLV.float().flatten(0, 1), targets_SL.flatten(), ignore_index=-100, reduction="sum")
    loss.backward()
    return float(loss.detach())


def _groups(tenants: Sequence[Tenant], max_tokens: int) -> list[list[int]]:
    """Cut the tenants, in order, so that rows times longest sequence stays within `max_tokens` per group."""
    groups: list[list[int]] = [[]]
    for index in range(len(tenants)):
        lengths = np.concatenate([tenants[member].batch.lengths_R for member in [*groups[-1], index]])
        if groups[-1] and len(lengths) * int(lengths.max()) > max_tokens:
            groups.append([])
        groups[-1].append(index)
    return groups


def _owners(tenants: Sequence[Tenant], group: Sequence[int]) -> Tensor:
    return torch.tensor([index for index in group for _ in range(tenants[index].batch.num_rows)])
