"""LoRA adapters as flat buffers, and the frozen linear that applies many of them to one packed stream.

An adapter is one flat float32 buffer; every site's A and B are views of it, so that an optimizer step, a
checkpoint or a digest is one operation on one tensor. This module does not know models, losses or optimizers.
"""

# Shape suffix legend
#   M = rows of the stream, N = rows of one segment, I = in features, O = out features, R = rank
#   S = R times the sites of a group, whose A lie one below the other

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from treadle_engine.errors import EngineError
from treadle_engine.grouped_segments import GroupedLows, GroupedSegments
from treadle_engine.half_segments import half_segments, serves, whole_sites
from treadle_engine.lora_products import (
    Block,
    add_gradients,
    add_lora,
    add_to_input_gradient,
    comes_once,
    low_gradient,
    product_dtype,
)
from treadle_engine.quantize import PackedLinear, PackedWeight
from treadle_engine.shards import Shard
from treadle_engine.short_segments import short_segments
from treadle_engine.spare_buffers import SpareBuffers, half_length

SiteKind = Literal["attn", "mlp", "unembed"]
Pair = tuple[Tensor, Tensor]

MAX_RANK = 512
# Each tensor starts on a cache line, wherever its neighbours end: BLAS kernels may choose by alignment.
_ALIGN = 16
# Rows of a segment below which the stream is converted as a whole (where it must be).
_SHORT = 128


@dataclass(frozen=True)
class LoraSite:
    """One linear of a base that may carry an adapter; `index` is fixed per base.

    `group` is the index of the first of the neighbouring sites that read the same input, often the site's own.
    """

    index: int
    module_name: str
    in_features: int
    out_features: int
    kind: SiteKind
    group: int


@dataclass(frozen=True)
class LoraConfig:
    """Rank, scale (alpha / rank), seed of the initial weights and the kinds of linears that are adapted."""

    rank: int = 32
    alpha: float = 32.0
    seed: int = 0
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = True

    def __post_init__(self) -> None:
        """Refuse what cannot be trained with BAD_LORA_CONFIG."""
        if not 1 <= self.rank <= MAX_RANK:
            raise EngineError("BAD_LORA_CONFIG", f"rank must be 1..{MAX_RANK}, got {self.rank}")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise EngineError("BAD_LORA_CONFIG", f"alpha must be a positive number, got {self.alpha}")
        if not 0 <= self.seed < 2**63:
            raise EngineError("BAD_LORA_CONFIG", f"seed must be 0..2^63-1, got {self.seed}")
        if not (self.train_attn or self.train_mlp or self.train_unembed):
            raise EngineError("BAD_LORA_CONFIG", "at least one of train_attn, train_mlp, train_unembed must be true")

    @property
    def scale(self) -> float:
        """Factor on B A x."""
        return self.alpha / self.rank

    def covers(self, kind: SiteKind) -> bool:
        """Tell whether sites of this kind are adapted."""
        return {"attn": self.train_attn, "mlp": self.train_mlp, "unembed": self.train_unembed}[kind]


class AdapterBase(Protocol):
    """What an adapter must know of its base."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype that the base computes in."""
        ...

    @property
    def device(self) -> torch.device:
        """Device that the base lives on."""
        ...

    def lora_sites(self, config: LoraConfig) -> tuple[LoraSite, ...]:
        """Sites that the configuration adapts, by rising index."""
        ...


class AdapterLayout:
    """Where every A [R, I] and the transpose of every B [O, R] lies in the flat buffer.

    The As of a group follow each other without a gap, so that one product serves them all. B lies transposed because
    products with a long thin [O, R] run at a fraction of the speed of those with [R, O] on a CPU.
    """

    def __init__(self, sites: Sequence[LoraSite], rank: int) -> None:
        """Lay the groups out in order, As before Bs; each group's As and each B are aligned."""
        self.sites = tuple(sites)
        self.whole = whole_sites(self.sites)
        self.rank = rank
        self._places: dict[int, tuple[LoraSite, int, int]] = {}
        end = 0
        for _, members in groupby(self.sites, key=lambda site: site.group):
            group, offset_a = list(members), end
            end = _aligned(offset_a + sum(rank * site.in_features for site in group))
            for site in group:
                self._places[site.index] = (site, offset_a, end)
                offset_a += rank * site.in_features
                end = _aligned(end + rank * site.out_features)
        self.num_elements = end
        # By site index, in values; -1 where the adapter has no weights.
        self.offsets_a, self.offsets_b = np.full((2, 1 + max(self._places, default=-1)), -1, np.int64)
        for index, (_, at_a, at_b) in self._places.items():
            self.offsets_a[index], self.offsets_b[index] = at_a, at_b

    def pairs(self, flat: Tensor) -> list[Pair | None]:
        """Return (A, B) views of `flat` by site index, None where the adapter has no weights; B is not contiguous."""
        pairs: list[Pair | None] = [None] * (1 + max(self._places, default=-1))
        for index in self._places:
            block = self.block(flat, index, 1)
            pairs[index] = None if block is None else (block.a_SI, block.bt_ROs[0].t())
        return pairs

    def block(self, flat: Tensor, first: int, count: int) -> Block | None:
        """Return the views of `count` sites from `first` on, members of one group; None without weights there."""
        if first not in self._places:
            return None
        site, offset, _ = self._places[first]
        a_SI = flat[offset : offset + count * self.rank * site.in_features].view(-1, site.in_features)
        bt_ROs = []
        for index in range(first, first + count):
            site, _, offset = self._places[index]
            bt_ROs.append(flat[offset : offset + self.rank * site.out_features].view(self.rank, site.out_features))
        return Block(a_SI, tuple(bt_ROs))


class FlatViews:
    """Views of one flat buffer by site, made once and kept: making them costs as much as a small product."""

    def __init__(self, layout: AdapterLayout, flat: Tensor) -> None:
        """Look at `flat` through `layout`."""
        self.flat = flat
        self._layout = layout
        self._blocks: dict[tuple[int, int], Block | None] = {}

    def block(self, first: int, count: int) -> Block | None:
        """Return what `AdapterLayout.block` returns."""
        key = (first, count)
        if key not in self._blocks:
            self._blocks[key] = self._layout.block(self.flat, first, count)
        return self._blocks[key]


class AdapterWeights:
    """One adapter's weights: flat float32 master, views per site, and copies in other dtypes that products need."""

    def __init__(self, base: AdapterBase, config: LoraConfig, flat: Tensor | None = None) -> None:
        """Take over `flat` (float32, the layout's length) or start from zeros."""
        self.config = config
        self.scale = config.scale
        self.layout = AdapterLayout(base.lora_sites(config), config.rank)
        if flat is None:
            flat = torch.zeros(self.layout.num_elements, dtype=torch.float32, device=base.device)
        if flat.shape != (self.layout.num_elements,) or flat.dtype != torch.float32:
            raise EngineError("INCOMPATIBLE_ADAPTER", f"expected {self.layout.num_elements} float32 values")
        self.flat = flat
        self._views = {torch.float32: FlatViews(self.layout, flat)}
        self._gradient_views: FlatViews | None = None

    @classmethod
    def init(cls, base: AdapterBase, config: LoraConfig) -> AdapterWeights:
        """Return fresh weights: A kaiming-uniform from `config.seed` alone, B zero."""
        weights = cls(base, config)
        # Drawn on the CPU in site order, so that a seed means the same weights on every device.
        generator = torch.Generator().manual_seed(config.seed)
        for site, (a_RI, _) in weights._masters():
            bound = 1.0 / math.sqrt(site.in_features)  # kaiming_uniform_ with a = sqrt(5)
            values = torch.empty(a_RI.shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
            a_RI.copy_(values)
        weights.refresh()
        return weights

    @classmethod
    def from_tensors(
        cls, base: AdapterBase, config: LoraConfig, tensors: Mapping[str, Tensor], spare: SpareBuffers | None = None
    ) -> AdapterWeights:
        """Build from `to_tensors`' names; missing, extra or misshapen tensors are INCOMPATIBLE_ADAPTER."""
        flat = None
        if spare is not None and base.device.type == "cpu":
            flat = spare.take(AdapterLayout(base.lora_sites(config), config.rank).num_elements)
        weights = cls(base, config, flat)
        left = set(tensors)
        for site, pair in weights._masters():
            for letter, view in zip("AB", pair, strict=True):
                name = tensor_name(site, letter)
                value = tensors.get(name)
                if value is None or value.shape != view.shape:
                    found = "nothing" if value is None else list(value.shape)
                    raise EngineError("INCOMPATIBLE_ADAPTER", f"{name}: expected {list(view.shape)}, found {found}")
                view.copy_(value)
                left.discard(name)
        if left:
            raise EngineError("INCOMPATIBLE_ADAPTER", f"tensors that the base has no place for: {sorted(left)[:3]}")
        if serves(base.dtype, base.device):
            weights.views(base.dtype, spare)  # now, not when the first product waits for it
        return weights

    def to_tensors(self) -> dict[str, Tensor]:
        """Return float32 views of the master by name."""
        return {
            tensor_name(site, letter): view
            for site, pair in self._masters()
            for letter, view in zip("AB", pair, strict=True)
        }

    def digest(self) -> str:
        """Return the sha256 (hex) of the master's bytes."""
        return hashlib.sha256(self.flat.detach().cpu().numpy().data).hexdigest()

    def refresh(self) -> None:
        """Bring the copies up to date after the master was changed."""
        for views in self._views.values():
            if views.flat is not self.flat:
                views.flat.copy_(self.flat)

    def views(self, dtype: torch.dtype, spare: SpareBuffers | None = None) -> FlatViews:
        """Return views of the weights in a dtype that products are in; the copy is made when it is first asked for.

        A buffer for it is taken from `spare` if it has one.
        """
        if dtype not in self._views:
            count = self.flat.numel()
            buffer = None if spare is None else spare.take(half_length(count))
            copy = self.flat.to(dtype) if buffer is None else buffer.view(dtype)[:count].copy_(self.flat)
            self._views[dtype] = FlatViews(self.layout, copy)
        return self._views[dtype]

    def views_of(self, grads: Tensor) -> FlatViews:
        """Return views of a gradient buffer; those of the latest one are kept."""
        if self._gradient_views is None or self._gradient_views.flat is not grads:
            self._gradient_views = FlatViews(self.layout, grads)
        return self._gradient_views

    @property
    def num_bytes(self) -> int:
        """Memory held, in bytes."""
        return sum(views.flat.nbytes for views in self._views.values())

    @property
    def buffer_lengths(self) -> list[int]:
        """Lengths, in float32 values, of the buffers that weights like these take from spare ones."""
        count = self.flat.numel()
        return [count if dtype == torch.float32 else half_length(count) for dtype in self._views]

    def _masters(self) -> list[tuple[LoraSite, Pair]]:
        pairs = self.layout.pairs(self.flat)
        return [(site, pair) for site in self.layout.sites if (pair := pairs[site.index]) is not None]


def tensor_name(site: LoraSite, letter: str) -> str:
    """Return the name of a site's A or B, as PEFT writes it after its own prefix."""
    return f"{site.module_name}.lora_{letter}.weight"


@dataclass
class Segment:
    """Rows [start, stop) of the stream that belong to one adapter; `grads` (flat float32) receives its gradient.

    What the rows add to `grads` is summed by itself, from zero, and then added once: so it has the same bits wherever
    it was computed. Only where `grads` is `fresh`, zero so far, it is summed in place: the bits are the same.
    """

    start: int
    stop: int
    weights: AdapterWeights | None
    grads: Tensor | None = None
    fresh: bool = True
    share: Block | None = None
    """At a site that the rows come to in several parts: where these are summed until `close_share`."""

    def product_dtype(self, stream: Tensor) -> torch.dtype:
        """Return the dtype of products with rows of `stream`: it follows from the segment's own length."""
        return product_dtype(stream.dtype, stream.device, self.stop - self.start)

    def block(self, first: int, count: int, dtype: torch.dtype) -> Block | None:
        """Return the weights of `count` neighbouring sites, None where this is the plain base."""
        return None if self.weights is None else self.weights.views(dtype).block(first, count)

    def gradient_block(self, first: int, count: int) -> Block | None:
        """Return the views of `grads` at `count` neighbouring sites, None when no gradient is wanted."""
        if self.grads is None or self.weights is None:
            return None
        return self.weights.views_of(self.grads).block(first, count)

    def open_share(self, site: int) -> None:
        """Have what comes for a site in several parts summed by itself; nothing to do where `grads` is fresh."""
        total = None if self.fresh else self.gradient_block(site, 1)
        self.share = None if total is None else total.zeros()

    def close_share(self, site: int) -> None:
        """Add what has come since `open_share`."""
        total, share, self.share = self.gradient_block(site, 1), self.share, None
        if total is not None and share is not None:
            total.add(share)


class Segments(tuple[Segment, ...]):
    """The segments of one stream, with what grouped ones have in common at all linears of a pass."""

    @classmethod
    def of(cls, segments: Sequence[Segment]) -> Segments:
        """Return the segments as such; what is one already is not looked at again."""
        return segments if isinstance(segments, cls) else cls(segments)

    def grouped(self, site: int, dtype: torch.dtype) -> GroupedSegments | None:
        """Return those whose products at a site of a base in `dtype` are grouped, None if there are none; for a CPU."""
        for some in (self._half if dtype == torch.bfloat16 else None, self._short):
            if some is not None and (there := some.at(site)) is not None:
                return there
        return None

    @cached_property
    def _half(self) -> GroupedSegments | None:
        return half_segments(self)

    @cached_property
    def _short(self) -> GroupedSegments | None:
        return short_segments(self)


@dataclass
class Lows:
    """A x^T of the segments at one group of linears, whose rows are those of all its sites."""

    each: list[Tensor | None]
    """[S, N] by segment; None where it is grouped, or has no LoRA here."""
    grouped: GroupedLows | None = None

    def select(self, segments: Sequence[Segment], kept: Sequence[Tensor]) -> Lows:
        """Return those of some rows of each segment, given by indices; `segments` are what remains of them."""
        each = [None if low is None else low.index_select(1, rows) for low, rows in zip(self.each, kept, strict=True)]
        return Lows(each, None if self.grouped is None else self.grouped.select(segments, kept))


class SegmentedLinear(nn.Linear):
    """A frozen linear plus the LoRA of whichever adapter owns each row.

    With a `shard` the frozen weight and bias are this rank's rows, and results are whole on every rank.
    """

    def __init__(self, linear: nn.Linear, site: int, shard: Shard | None = None) -> None:
        """Share the weights of `linear`, which may be packed."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.packed: PackedWeight | None = None
        if isinstance(linear, PackedLinear | SegmentedLinear):
            self.packed = linear.packed
        self.site, self.shard = site, shard
        self.segments: Sequence[Segment] = ()
        self.anchor: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that nn.Linear gives it
        """Map [..., I] to [..., O]; gradients of A and B go straight into the segments' buffers."""
        x_MI = input.reshape(-1, self.in_features)
        if torch.is_grad_enabled():
            y_MO: Tensor = _SegmentedLora.apply(x_MI, self.anchor, self)  # type: ignore[no-untyped-call]
        else:
            y_MO, _ = self.project(x_MI, self.segments)
        return y_MO.view(*input.shape[:-1], self.out_features)

    def frozen_weight(self) -> Tensor:
        """Return W [O, I], or a shard's rows, in compute dtype; valid until any linear of the base is asked again."""
        return self.weight if self.packed is None else self.packed.unpack()

    def base_product(self, x_MI: Tensor) -> Tensor:
        """Return W x + b of the frozen linear, [M, O], or a shard's columns of it."""
        return F.linear(x_MI, self.frozen_weight(), self.bias)

    @staticmethod
    def base_products(linears: Sequence[SegmentedLinear], x_MI: Tensor) -> list[Tensor]:
        """Return W x + b of each of some linears that share their input, [M, O]."""
        ys = [linear.base_product(x_MI) for linear in linears]
        shard = linears[0].shard
        return ys if shard is None else shard.gather(ys, [linear.out_features for linear in linears])

    @staticmethod
    def base_input_gradient(linears: Sequence[SegmentedLinear], gradients: Sequence[Tensor]) -> Tensor:
        """Return the gradient [M, I] of the input that the frozen linears share, given that of each one's output."""
        g_MI: Tensor | None = None
        shard = linears[0].shard
        for linear, g_MO in zip(linears, gradients, strict=True):
            weight_OI = linear.frozen_weight()
            if shard is not None:
                own = shard.own(linear.out_features)
                g_MO, weight_OI = g_MO[:, own], weight_OI[: own.stop - own.start]  # noqa: PLW2901 - this rank's part
            g_MI = g_MO.mm(weight_OI) if g_MI is None else g_MI.addmm_(g_MO, weight_OI)
        assert g_MI is not None  # a group has a member
        return g_MI if shard is None else shard.sum_(g_MI)

    def project(self, x_MI: Tensor, segments: Sequence[Segment]) -> tuple[Tensor, Lows]:
        """Return y_MO and the segments' A x^T."""
        (y_MO,), lows = self.project_group((self,), x_MI, segments)
        return y_MO, lows

    @classmethod
    def project_group(
        cls, linears: Sequence[SegmentedLinear], x_MI: Tensor, segments: Sequence[Segment]
    ) -> tuple[list[Tensor], Lows]:
        """Return y_MO of each linear of one group, which share their input, and the segments' A x^T."""
        ys = cls.base_products(linears, x_MI)
        segments = Segments.of(segments)
        first, count = linears[0].site, len(linears)
        lows = Lows([None] * len(segments))
        together = segments.grouped(first, x_MI.dtype) if x_MI.device.type == "cpu" else None
        if together is not None:
            lows.grouped = together.forward(first, x_MI, ys)
        grouped: frozenset[int] = frozenset() if together is None else together.places
        streams: _Streams | None = None
        for index, segment in enumerate(segments):
            if index in grouped or segment.weights is None:
                continue
            dtype = segment.product_dtype(x_MI)
            block = segment.block(first, count, dtype)
            if block is None:
                continue
            streams = streams or _Streams(segments, (x_MI,))
            rows = slice(segment.start, segment.stop)
            (x_NI,) = streams.rows(rows, dtype)
            lows.each[index] = add_lora(block, x_NI, [y_MO[rows] for y_MO in ys], segment.weights.scale)
        return ys, lows

    def project_backward(
        self,
        g_MO: Tensor,
        x_MI: Tensor,
        lows: Lows,
        segments: Sequence[Segment],
        need_input: bool,
    ) -> Tensor | None:
        """Accumulate dA and dB segment by segment, in order; return dx_MI if it is needed."""
        return self.group_backward((self,), (g_MO,), x_MI, lows, segments, need_input)

    @classmethod
    def group_backward(
        cls,
        linears: Sequence[SegmentedLinear],
        gradients: Sequence[Tensor],
        x_MI: Tensor,
        lows: Lows,
        segments: Sequence[Segment],
        need_input: bool,
    ) -> Tensor | None:
        """Do what `project_backward` does for a group, given the gradient g_MO of each of its outputs."""
        g_MI = cls.base_input_gradient(linears, gradients) if need_input else None
        first, count = linears[0].site, len(linears)
        shares: dict[int, Block | None] = {}
        if lows.grouped is not None:
            together = lows.grouped.owner
            left = together.backward(first, gradients, x_MI, lows.grouped, g_MI)
            shares = dict(zip(together.indices, left, strict=True))
        streams: _Streams | None = None
        for index, (segment, low_SN) in enumerate(zip(segments, lows.each, strict=True)):
            # In the order of the stream, whoever computes: that in which a run's chunks are added.
            total, more = segment.gradient_block(first, count), shares.get(index)
            if total is not None and more is not None:
                total.add(more)
            if low_SN is None or segment.weights is None:
                continue
            # That of the forward pass, where the segment may have had more rows.
            dtype = low_SN.dtype
            block = segment.block(first, count, dtype)
            if block is None or (g_MI is None and total is None):
                continue
            streams = streams or _Streams(segments, (x_MI, *gradients))
            scale, rows = segment.weights.scale, slice(segment.start, segment.stop)
            x_NI, *own = streams.rows(rows, dtype)
            g_SN = low_gradient(block, own)
            if g_MI is not None:
                add_to_input_gradient(block, g_SN, g_MI[rows], scale)
            if total is not None:
                in_place = total if segment.fresh else segment.share
                if in_place is None and comes_once(dtype, scale):
                    in_place = total
                share = total.zeros() if in_place is None else in_place
                add_gradients(share, g_SN, low_SN, x_NI, own, scale)
                if in_place is None:
                    total.add(share)
        return g_MI


class _SegmentedLora(torch.autograd.Function):
    """Frozen linear and LoRA as one node: no gradient for W, and A and B are not autograd leaves at all."""

    @staticmethod
    def forward(ctx: Any, x_MI: Tensor, anchor: Tensor | None, linear: SegmentedLinear) -> Tensor:
        # The anchor is a dummy that requires a gradient: without it autograd would skip the first layer,
        # whose input (the embedding) needs none.
        y_MO, lows = linear.project(x_MI, linear.segments)
        ctx.linear, ctx.lows, ctx.segments = linear, lows, linear.segments
        ctx.save_for_backward(x_MI)
        return y_MO

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, None, None]:
        (x_MI,) = ctx.saved_tensors
        need_input: bool = ctx.needs_input_grad[0]
        g_MO = grad_outputs[0].contiguous()
        return ctx.linear.project_backward(g_MO, x_MI, ctx.lows, ctx.segments, need_input), None, None


class _Streams:
    """Streams whose rows are taken segment by segment, in the dtype of its products."""

    def __init__(self, segments: Sequence[Segment], streams: Sequence[Tensor]) -> None:
        """Convert them as a whole where segments are short, to save a conversion for each.

        Those of long segments are converted one by one, while they are in the cache: the bits are the same.
        """
        self._streams = streams
        short = len(segments) * _SHORT >= streams[0].shape[0]
        self._wide = [stream.float() for stream in streams] if short and streams[0].device.type == "cpu" else streams

    def rows(self, rows: slice, dtype: torch.dtype) -> list[Tensor]:
        """Return rows of each stream."""
        source = self._wide if dtype == torch.float32 else self._streams
        return [stream[rows].to(dtype) for stream in source]


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGN) * _ALIGN
