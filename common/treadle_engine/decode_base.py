"""A base whose rows do not depend on how many rows their adapter has in the step, nor on who else is there.

Training cuts a stream by content; in decoding the number of rows of an adapter follows from who else samples. So a
step's adapters are applied by `StepLora` on a CPU, by `StepAdapters` elsewhere. Knows nothing of decoding.
"""

# Shape suffix legend
#   M = rows of the stream, I = in features, O = out features, R = rank, B = batch, C = columns

from __future__ import annotations

import platform
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from treadle_engine.adapter_slots import AdapterSlots, StepAdapters
from treadle_engine.attention import AttentionPlan
from treadle_engine.base_model import ROW_MULTIPLE, BaseInfo, BaseModel
from treadle_engine.decode_lean import DecodeLean, compile_kernels
from treadle_engine.half_segments import prepare_products
from treadle_engine.kernel_attention import prepare_attention
from treadle_engine.lora import Lows, Segment, SegmentedLinear, Segments
from treadle_engine.shards import Shard
from treadle_engine.step_lora import Scratch, StepLora, compile_kernel

_ONEDNN = ("x86_64", "AMD64")
"""Machines for which torch brings oneDNN's own kernels."""
_BLOCK_ROWS = (4, 8)
_PROBE_ROWS = 64


class SlottedLinear(SegmentedLinear):
    """A segmented linear that leaves LoRA to the step's adapters; for inference only."""

    _prepacked: Tensor | None = None

    def prepack(self) -> None:
        """Keep a copy of the weight in oneDNN's blocked layout, which serves any number of rows."""
        if self.packed is None:
            self._prepacked = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), ROW_MULTIPLE)

    def base_product(self, x_MI: Tensor) -> Tensor:
        """Return W x + b of the frozen linear, [M, O], or a shard's columns of it."""
        if self._prepacked is None:
            return super().base_product(x_MI)
        y_MO: Tensor = torch.ops.mkldnn._linear_pointwise(x_MI, self._prepacked, self.bias, "none", [], "")
        return y_MO

    @classmethod
    def project_group(
        cls, linears: Sequence[SegmentedLinear], x_MI: Tensor, segments: Sequence[Segment]
    ) -> tuple[list[Tensor], Lows]:
        """Return y_MO of each linear; segments that `DecodeBase.adapters` has not made get a trainer's products."""
        if not isinstance(segments, StepAdapters | StepLora):
            return super().project_group(linears, x_MI, segments)
        ys = cls.base_products(linears, x_MI)
        segments.add_to([linear.site for linear in linears], x_MI, ys)
        return ys, Lows([])


class DecodeBase(BaseModel):
    """A `BaseModel` with slotted linears."""

    def __init__(self, model: PreTrainedModel, info: BaseInfo, shard: Shard | None = None) -> None:
        """Replace the segmented linears, sharing their weights."""
        super().__init__(model, info, shard)
        for index, (site, linear) in enumerate(zip(self.sites, self.linears, strict=True)):
            self.linears[index] = SlottedLinear(linear, site.index, shard)
            model.set_submodule(site.module_name, self.linears[index])
        self._unembed = self.linears[-1]
        self.block_rows = smallest_block(self)
        self._trained = self.lean
        self._scratch = Scratch([(linear.in_features, linear.out_features) for linear in self.linears])
        self._slots = AdapterSlots(self.sites, self.dtype, self.device, self.block_rows, ROW_MULTIPLE)

    def prepack(self) -> bool:
        """Copy the linears into the layout that a CPU multiplies fastest; tell whether this device has one.

        Steps are short of rows, so that a product otherwise spends much of its time on rearranging its weight. The copy
        is this process's own; the weights that it was made from are not read any more, and stay on disk if mapped.
        """
        has_onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        if self.device.type != "cpu" or platform.machine() not in _ONEDNN or not has_onednn:
            return False
        for linear in self.linears:
            cast(SlottedLinear, linear).prepack()
        if self.lean is not None:
            self.lean = DecodeLean(self.model, self.context)
        return True

    def compile(self) -> None:
        """Compile the kernels of this base's steps, or load them from disk: else the first request waits for it."""
        if self.device.type == "cpu" and not prepare_products(self.dtype, self.device, self.sites):
            compile_kernel(self.dtype)
        prepare_attention(self.dtype, self.device)
        if isinstance(self.lean, DecodeLean):
            compile_kernels(self.dtype)

    def adapters(self, segments: Sequence[Segment]) -> StepAdapters | StepLora:
        """Return the segments, by rows, with what applies their adapters in the calls of one step."""
        if self.device.type != "cpu":
            return StepAdapters(segments, self._slots)
        return StepLora(segments, self._scratch, self.dtype)

    def hidden_as_trained(
        self, tokens_T: Tensor, positions_T: Tensor, attention: AttentionPlan, segments: Sequence[Segment]
    ) -> Tensor:
        """Return x_TD as a trainer computes it, but for the layout of prepacked weights; `segments` by texts."""
        lean, self.lean = self.lean, self._trained
        try:
            return self.hidden(tokens_T, positions_T, attention, Segments.of(segments))
        finally:
            self.lean = lean


@torch.no_grad()
def smallest_block(base: BaseModel) -> int:
    """Return the fewest rows from which a batched product gives a row the bits that it has among many: 4, 8 or 16.

    The products are those of attention on a CPU, of stacked adapters elsewhere.
    """
    generator = torch.Generator().manual_seed(0)
    widths = {(linear.in_features, linear.out_features) for linear in base.linears[:-1]}
    width = base.info.head_dim
    shapes = [(width, 64), (64, width), (width, 320), (320, width)]
    if base.device.type != "cpu":
        shapes = [(inner, 16) for inner, _ in widths] + [(16, outer) for _, outer in widths]

    def holds(rows: int) -> bool:
        for inner, outer in shapes:
            x_BMI = torch.randn(2, _PROBE_ROWS, inner, generator=generator).to(base.device, base.dtype)
            w_BIO = torch.randn(2, outer, inner, generator=generator).to(base.device, base.dtype).transpose(1, 2)
            y_BMO = torch.randn(2, _PROBE_ROWS, outer, generator=generator).to(base.device, base.dtype)
            many_BMO = torch.baddbmm(y_BMO, x_BMI, w_BIO, alpha=2.0)
            for start in (0, 3):
                cut = slice(start, start + rows)
                few_BMO = torch.baddbmm(y_BMO[:, cut].contiguous(), x_BMI[:, cut].contiguous(), w_BIO, alpha=2.0)
                if not torch.equal(few_BMO, many_BMO[:, cut]):
                    return False
            if not torch.equal(torch.bmm(x_BMI[:, :rows].contiguous(), w_BIO), torch.bmm(x_BMI, w_BIO)[:, :rows]):
                return False
        return True

    return next((rows for rows in _BLOCK_ROWS if holds(rows)), ROW_MULTIPLE)
