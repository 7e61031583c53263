"""A base whose rows do not depend on how many rows their adapter has in the step.

Training cuts a stream by content; in decoding the number of rows of an adapter follows from who else samples, and
below 16 rows CPU BLAS picks its kernel by the row count. So small segments are padded. Knows nothing of decoding.
"""

# Shape suffix legend
#   M = rows of the stream, N = rows of small segments, P = those rows padded, R = rank, I = in features
#   O = out features

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from treadle_engine.base_model import ROW_MULTIPLE, BaseInfo, BaseModel
from treadle_engine.lora import Segment, SegmentedLinear
from treadle_engine.lora_products import add_lora


class PaddedSegments(list[Segment]):
    """Segments of one step, with the gathering of the small ones worked out once for all linears."""

    def __init__(self, segments: Sequence[Segment], device: torch.device) -> None:
        """Give each segment below 16 rows a block of 16, filled up with its first row."""
        super().__init__(segments)
        small = [segment for segment in segments if segment.stop - segment.start < ROW_MULTIPLE]
        self.large = [segment for segment in segments if segment.stop - segment.start >= ROW_MULTIPLE]
        self.small = small
        rows: list[int] = []
        padded: list[int] = []
        places: list[int] = []
        for block, segment in enumerate(small):
            count = segment.stop - segment.start
            own = range(segment.start, segment.stop)
            rows += own
            padded += [*own, *[segment.start] * (ROW_MULTIPLE - count)]
            places += range(block * ROW_MULTIPLE, block * ROW_MULTIPLE + count)
        self.rows_N = torch.tensor(rows, dtype=torch.int64, device=device)
        self.rows_P = torch.tensor(padded, dtype=torch.int64, device=device)
        self.places_N = torch.tensor(places, dtype=torch.int64, device=device)


class PaddedLinear(SegmentedLinear):
    """A segmented linear that applies LoRA to at least 16 rows at a time; for inference only."""

    def project(self, x_MI: Tensor, segments: Sequence[Segment]) -> tuple[Tensor, list[Tensor | None]]:
        """Return y_MO; x A^T is not kept."""
        y_MO = F.linear(x_MI, self.frozen_weight(), self.bias)
        if not segments:
            return y_MO, []
        padded = segments if isinstance(segments, PaddedSegments) else PaddedSegments(segments, x_MI.device)
        for segment in padded.large:
            self._add(segment, x_MI[segment.start : segment.stop], y_MO[segment.start : segment.stop])
        if padded.small:
            # The base's part goes into the padded addmm too: a product that is added later would round differently.
            y_PO = y_MO.index_select(0, padded.rows_P)
            blocks_x = torch.split(x_MI.index_select(0, padded.rows_P), ROW_MULTIPLE)
            blocks_y = torch.split(y_PO, ROW_MULTIPLE)
            for segment, x_BI, y_BO in zip(padded.small, blocks_x, blocks_y, strict=True):
                self._add(segment, x_BI, y_BO)
            y_MO.index_copy_(0, padded.rows_N, y_PO.index_select(0, padded.places_N))
        return y_MO, []

    @classmethod
    def project_group(
        cls, linears: Sequence[SegmentedLinear], x_MI: Tensor, segments: Sequence[Segment]
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """Return y_MO of each linear; nothing is kept."""
        return [linear.project(x_MI, segments)[0] for linear in linears], []

    def _add(self, segment: Segment, x_NI: Tensor, y_NO: Tensor) -> None:
        block = segment.block(self.site, 1)
        if block is not None and segment.weights is not None:
            add_lora(block, x_NI, [y_NO], segment.weights.scale)


class DecodeBase(BaseModel):
    """A `BaseModel` with padded linears."""

    def __init__(self, model: PreTrainedModel, info: BaseInfo) -> None:
        """Replace the segmented linears, sharing their weights."""
        super().__init__(model, info)
        for index, (site, linear) in enumerate(zip(self.sites, self.linears, strict=True)):
            self.linears[index] = PaddedLinear(linear, site.index)
            model.set_submodule(site.module_name, self.linears[index])
        self._unembed = self.linears[-1]

    @classmethod
    def load(
        cls,
        path_or_name: str,
        *,
        name: str | None = None,
        dtype: str = "auto",
        device: str = "cpu",
        quantize: str = "none",
    ) -> DecodeBase:
        """Load a base for decoding; see `BaseModel.load`."""
        base = super().load(path_or_name, name=name, dtype=dtype, device=device, quantize=quantize)
        assert isinstance(base, DecodeBase)  # made by cls
        return base
