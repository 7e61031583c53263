"""LoRA products of many tenants' short segments: one by one, in grouped calls, and batched for all.

All do forward, input gradient and the gradients of A and B of one linear for 64 tenants. Grouped calls are those of the
engine's `ShortSegments`, over segments and adapters as a pass has them. The batched form needs the adapters side by
side in a slab (or gathered into one first) and segments of one length, so ragged ones are padded.
It measures the rule by which the engine groups short segments; decoding, with one row per tenant, goes by batches.
"""

# Shape suffix legend
#   B = tenants, N = tokens per tenant, I = in features, O = out features, R = rank

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from treadle_engine.grouped_gemm import available
from treadle_engine.lora import AdapterWeights, LoraConfig, LoraSite, Segment
from treadle_engine.lora_products import Block, add_gradients, add_lora, add_to_input_gradient, low_gradient
from treadle_engine.short_segments import short_segments

Row = dict[str, Any]  # Any: JSON values

TENANTS = 64
LENGTHS: dict[str, Sequence[int]] = {
    "1 token": (1,),
    "4 tokens": (4,),
    "16 tokens": (16,),
    "32 tokens": (32,),
    "64 tokens": (64,),
    "12 to 40 tokens": range(12, 41),
}
"""Segment lengths by name, given to the tenants in turn."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's options."""
    parser.add_argument("--rounds", type=int, default=9, help="rounds of each side")
    parser.add_argument("--features", type=int, default=512, help="in and out features of the linear")
    parser.add_argument("--ranks", type=int, nargs="*", default=[8, 32])


def run(options: argparse.Namespace) -> list[Row]:
    """Times all forms for each rank and length and returns the rows."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    for rank in options.ranks:
        for name, cycle in LENGTHS.items():
            case = _Case([cycle[index % len(cycle)] for index in range(TENANTS)], options.features, rank)
            rows += _compare(f"{TENANTS} tenants, rank {rank}, {name} each", case, options.rounds)
    return rows


@dataclass(frozen=True)
class _OneLinear:
    """A base with one linear, as many features in as out."""

    features: int
    device: torch.device
    dtype: torch.dtype = torch.float32

    def lora_sites(self, config: LoraConfig) -> tuple[LoraSite, ...]:
        return (LoraSite(0, "linear", self.features, self.features, "mlp", 0),)


class _Case:
    """The same adapters and rows for all forms."""

    def __init__(self, lengths: Sequence[int], features: int, rank: int) -> None:
        self.lengths, self.longest = lengths, max(lengths)
        self.a_BRI, self.bt_BRO = torch.randn(TENANTS, rank, features), torch.randn(TENANTS, rank, features)
        self.da_BRI, self.db_BRO = torch.zeros_like(self.a_BRI), torch.zeros_like(self.bt_BRO)
        total = sum(lengths)
        self.x, self.g = torch.randn(total, features), torch.randn(total, features)
        self.y, self.gx = torch.zeros(total, features), torch.zeros(total, features)
        self._blocks = [Block(a, (b,)) for a, b in zip(self.a_BRI, self.bt_BRO, strict=True)]
        self._totals = [Block(a, (b,)) for a, b in zip(self.da_BRI, self.db_BRO, strict=True)]
        self._some = torch.arange(TENANTS)
        self._segments: list[Segment] = []
        at = torch.zeros(TENANTS, self.longest, dtype=torch.long)
        base = _OneLinear(features, torch.device("cpu"))
        config = LoraConfig(rank=rank, alpha=float(rank))
        start = 0
        for index, length in enumerate(lengths):
            weights = AdapterWeights(base, config)
            weights.flat.copy_(torch.cat([self.a_BRI[index].flatten(), self.bt_BRO[index].flatten()]))
            grads = torch.zeros_like(weights.flat)
            self._segments.append(Segment(start, start + length, weights, grads))
            at[index, :length] = torch.arange(start, start + length)
            start += length
        # Once for all linears of a pass.
        self._short = short_segments(self._segments)
        self._at, self._real = at.view(-1), torch.arange(self.longest) < torch.tensor(lengths)[:, None]

    def segments(self) -> None:
        """Go segment by segment, as the engine does with long ones."""
        start = 0
        for block, total, length in zip(self._blocks, self._totals, self.lengths, strict=True):
            rows, own = slice(start, start + length), [self.g[start : start + length]]
            low = add_lora(block, self.x[rows], [self.y[rows]], 1.0)
            low_g = low_gradient(block, own)
            add_to_input_gradient(block, low_g, self.gx[rows], 1.0)
            add_gradients(total, low_g, low, self.x[rows], own, 1.0)
            start += length

    def grouped(self) -> None:
        """Group them, as the engine does where there is a grouped product."""
        short = self._short
        assert short is not None  # `_compare` asks before
        lows = short.forward(0, self.x, [self.y])
        short.backward(0, [self.g], self.x, lows, self.gx)

    def slab(self) -> None:
        """One batched product over a slab of all adapters."""
        self._batched(self.a_BRI, self.bt_BRO)

    def gathered(self) -> None:
        """The same with the adapters gathered from a larger slab first."""
        self._batched(self.a_BRI.index_select(0, self._some), self.bt_BRO.index_select(0, self._some))

    def _batched(self, a_BRI: Tensor, bt_BRO: Tensor) -> None:
        ragged = len(set(self.lengths)) > 1
        x_BNI, g_BNO = (self._padded(rows) if ragged else self._cut(rows) for rows in (self.x, self.g))
        low = a_BRI.bmm(x_BNI.transpose(1, 2))
        low_g = bt_BRO.bmm(g_BNO.transpose(1, 2))
        if ragged:
            self.y += low.transpose(1, 2).bmm(bt_BRO)[self._real]
            self.gx += low_g.transpose(1, 2).bmm(a_BRI)[self._real]
        else:
            self._cut(self.y).baddbmm_(low.transpose(1, 2), bt_BRO)
            self._cut(self.gx).baddbmm_(low_g.transpose(1, 2), a_BRI)
        self.da_BRI.baddbmm_(low_g, x_BNI)
        self.db_BRO.baddbmm_(low, g_BNO)

    def _cut(self, rows: Tensor) -> Tensor:
        return rows.view(TENANTS, self.longest, -1)

    def _padded(self, rows: Tensor) -> Tensor:
        padded: Tensor = rows.index_select(0, self._at).view(TENANTS, self.longest, -1)
        return padded.mul_(self._real[:, :, None])


def _compare(name: str, case: _Case, rounds: int) -> list[Row]:
    sides: dict[str, Callable[[], None]] = {
        "segment by segment": case.segments,
        **({"grouped": case.grouped} if available() else {}),
        "batched over a slab": case.slab,
        "gathered and batched": case.gathered,
    }
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for index in range(rounds + 1):
        for side, step in sides.items():
            start = time.process_time()
            step()
            if index:
                seconds[side].append(time.process_time() - start)
    own = median(seconds["segment by segment"])
    rows: list[Row] = []
    for side in list(sides)[1:]:
        ratio = median(a / b for a, b in zip(seconds["segment by segment"], seconds[side], strict=True))
        value = f"{ratio:.2f}x the speed of segment by segment ({1e3 * own:.1f} ms CPU)"
        rows.append({"figure": f"{name}: {side}", "value": value, "cpu": ratio})
    return rows
