"""LoRA adapters as flat buffers, and the frozen linear that applies many of them to one packed stream.

An adapter is one flat float32 buffer; every site's A and B are views of it, so that an optimizer step, a
checkpoint or a digest is one operation on one tensor. This module does not know models, losses or optimizers.
"""

# Shape suffix legend
#   M = rows of the stream, N = rows of one segment, I = in features, O = out features, R = rank

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from treadle_engine.errors import EngineError
from treadle_engine.quantize import PackedLinear, PackedWeight

SiteKind = Literal["attn", "mlp", "unembed"]
Pair = tuple[Tensor, Tensor]

MAX_RANK = 512
# Each tensor starts on a cache line, wherever its neighbours end: BLAS kernels may choose by alignment.
_ALIGN = 16


@dataclass(frozen=True)
class LoraSite:
    """One linear of a base that may carry an adapter; `index` is fixed per base."""

    index: int
    module_name: str
    in_features: int
    out_features: int
    kind: SiteKind


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
    """Where every A [R, I] and B [O, R] lies in the flat buffer."""

    def __init__(self, sites: Sequence[LoraSite], rank: int) -> None:
        """Lay the sites out in order, A before B, each aligned."""
        self.sites = tuple(sites)
        self.rank = rank
        self._num_slots = 1 + max((site.index for site in self.sites), default=-1)
        self._offsets: list[tuple[int, int]] = []
        end = 0
        for site in self.sites:
            offset_a = end
            offset_b = _aligned(offset_a + rank * site.in_features)
            end = _aligned(offset_b + site.out_features * rank)
            self._offsets.append((offset_a, offset_b))
        self.num_elements = end

    def pairs(self, flat: Tensor) -> list[Pair | None]:
        """Return (A, B) views of `flat` by site index, None where the adapter has no weights."""
        pairs: list[Pair | None] = [None] * self._num_slots
        for site, (offset_a, offset_b) in zip(self.sites, self._offsets, strict=True):
            a_RI = flat[offset_a : offset_a + self.rank * site.in_features].view(self.rank, site.in_features)
            b_OR = flat[offset_b : offset_b + site.out_features * self.rank].view(site.out_features, self.rank)
            pairs[site.index] = (a_RI, b_OR)
        return pairs


class AdapterWeights:
    """One adapter's weights: flat float32 master, views per site, and a copy in the base's dtype if that differs."""

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
        self._shadow = flat if base.dtype == torch.float32 else flat.to(base.dtype)
        self.pairs = self.layout.pairs(self._shadow)

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
    def from_tensors(cls, base: AdapterBase, config: LoraConfig, tensors: Mapping[str, Tensor]) -> AdapterWeights:
        """Build from `to_tensors`' names; missing, extra or misshapen tensors are INCOMPATIBLE_ADAPTER."""
        weights = cls(base, config)
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
        weights.refresh()
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
        """Bring the compute copy up to date after the master was changed."""
        if self._shadow is not self.flat:
            self._shadow.copy_(self.flat)

    @property
    def num_bytes(self) -> int:
        """Memory held, in bytes."""
        shadow = 0 if self._shadow is self.flat else self._shadow.nbytes
        return self.flat.nbytes + shadow

    def _masters(self) -> list[tuple[LoraSite, Pair]]:
        pairs = self.layout.pairs(self.flat)
        return [(site, pair) for site in self.layout.sites if (pair := pairs[site.index]) is not None]


def tensor_name(site: LoraSite, letter: str) -> str:
    """Return the name of a site's A or B, as PEFT writes it after its own prefix."""
    return f"{site.module_name}.lora_{letter}.weight"


@dataclass
class Segment:
    """Rows [start, stop) of the stream that belong to one adapter; `grads` (flat float32) receives its gradient."""

    start: int
    stop: int
    weights: AdapterWeights | None
    grads: Tensor | None = None
    _views: list[Pair | None] | None = field(default=None, repr=False, compare=False)

    def pair(self, site: int) -> Pair | None:
        """Return (A, B) in compute dtype at a site, None where this segment is the plain base."""
        if self.weights is None or site >= len(self.weights.pairs):
            return None
        return self.weights.pairs[site]

    def grad_pair(self, site: int) -> Pair | None:
        """Return (dA, dB) views of `grads` at a site, None when no gradient is wanted."""
        if self.grads is None or self.weights is None:
            return None
        if self._views is None:
            self._views = self.weights.layout.pairs(self.grads)
        return self._views[site] if site < len(self._views) else None


class SegmentedLinear(nn.Linear):
    """A frozen linear plus the LoRA of whichever adapter owns each row."""

    def __init__(self, linear: nn.Linear, site: int) -> None:
        """Share the weights of `linear`, which may be packed."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.packed: PackedWeight | None = None
        if isinstance(linear, PackedLinear | SegmentedLinear):
            self.packed = linear.packed
        self.site = site
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
        """Return W [O, I] in compute dtype; valid until any linear of the base is asked again."""
        return self.weight if self.packed is None else self.packed.unpack()

    def project(self, x_MI: Tensor, segments: Sequence[Segment]) -> tuple[Tensor, list[Tensor | None]]:
        """Return y_MO and each segment's x A^T (None where it has no LoRA here)."""
        y_MO = F.linear(x_MI, self.frozen_weight(), self.bias)
        lows: list[Tensor | None] = []
        for segment in segments:
            pair = segment.pair(self.site)
            if pair is None or segment.weights is None:
                lows.append(None)
                continue
            low_NR = x_MI[segment.start : segment.stop].mm(pair[0].t())
            y_MO[segment.start : segment.stop].addmm_(low_NR, pair[1].t(), alpha=segment.weights.scale)
            lows.append(low_NR)
        return y_MO, lows

    def project_backward(
        self,
        g_MO: Tensor,
        x_MI: Tensor,
        lows: Sequence[Tensor | None],
        segments: Sequence[Segment],
        need_input: bool,
        into: Tensor | None = None,
    ) -> Tensor | None:
        """Accumulate dA and dB segment by segment, in order; return dx_MI, added to `into`, if it is needed."""
        g_MI: Tensor | None = None
        if need_input:
            weight_OI = self.frozen_weight()
            g_MI = g_MO.mm(weight_OI) if into is None else into.addmm_(g_MO, weight_OI)
        for segment, low_NR in zip(segments, lows, strict=True):
            pair, grads = segment.pair(self.site), segment.grad_pair(self.site)
            if low_NR is None or pair is None or segment.weights is None or (g_MI is None and grads is None):
                continue
            scale, rows = segment.weights.scale, slice(segment.start, segment.stop)
            g_NR = g_MO[rows].mm(pair[1])
            if g_MI is not None:
                g_MI[rows].addmm_(g_NR, pair[0], alpha=scale)
            if grads is not None:
                _accumulate(grads[0], g_NR, x_MI[rows], scale)
                _accumulate(grads[1], g_MO[rows], low_NR, scale)
        return g_MI


def _accumulate(total: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """Add scale * left^T right to the float32 `total`; the product itself is float32 whatever the inputs are."""
    if left.dtype == torch.float32:
        total.addmm_(left.t(), right, alpha=scale)
    elif left.is_cuda:
        total.add_(torch.mm(left.t(), right, out_dtype=torch.float32), alpha=scale)
    else:
        total.addmm_(left.t().float(), right.float(), alpha=scale)


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


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGN) * _ALIGN
