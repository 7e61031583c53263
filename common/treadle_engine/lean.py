"""The decoder of Llama, Qwen2 and Qwen3 written out, with its own backward, over the modules of transformers.

The whole stack is one autograd node: no graph is built inside it but for attention, norms and SwiGLU keep only what
their backward needs, and a layer's saved tensors are freed as soon as the backward has passed it (a checkpointed
layer keeps only its input). It computes what the modules compute, with their own weights; other architectures go
through transformers' forward. This module does not know losses, optimizers, or what a segment's adapter is.
"""

# Shape suffix legend
#   P = packed tokens plus padding rows, D = hidden, H = query heads, G = key/value heads, h = either
#   d = head dimension, F = features between gate/up and down, I / O = in / out features of a linear

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from treadle_engine.attention import PassContext
from treadle_engine.lora import Lows, Segment, SegmentedLinear

# Exact classes: a subclass may change any line of the forward.
_ATTENTION = {"LlamaAttention", "Qwen2Attention", "Qwen3Attention"}
_DECODERS = {"LlamaModel", "Qwen2Model", "Qwen3Model"}
_LAYERS = {"LlamaDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"}
_MLPS = {"LlamaMLP", "Qwen2MLP", "Qwen3MLP"}
_NORMS = {"LlamaRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm"}

Module = Any  # modules of transformers, whose attributes nn.Module does not type


@dataclass
class _NormSaved:
    """What the backward of a root-mean-square norm needs: its float32 input and the factor of each row."""

    x: Tensor
    factor: Tensor


@dataclass
class _LinearSaved:
    """The input that a group of linears shares and its A x^T by segment."""

    x_PI: Tensor
    lows: Lows


@dataclass
class _AttentionSaved:
    """The leaves and the result of the one graph that is built, that of the attention plan."""

    q_PHd: Tensor
    k_PGd: Tensor
    v_PGd: Tensor
    o_PHd: Tensor


@dataclass
class _LayerSaved:
    """Everything that one layer keeps for its backward."""

    input_norm: _NormSaved
    qkv: _LinearSaved
    q_norm: _NormSaved | None
    k_norm: _NormSaved | None
    attention: _AttentionSaved
    o: _LinearSaved
    post_norm: _NormSaved
    gate_up: _LinearSaved
    gate_PF: Tensor
    silu_PF: Tensor
    up_PF: Tensor
    down: Lows


def matches(model: PreTrainedModel) -> bool:
    """Tell whether the model's decoder is exactly one of those written out here."""
    decoder: Module = model.get_decoder()  # type: ignore[no-untyped-call]
    if type(decoder).__name__ not in _DECODERS or getattr(decoder.config, "hidden_act", None) != "silu":
        return False
    return _is(decoder.norm, _NORMS) and all(
        _is(layer, _LAYERS)
        and _is(layer.self_attn, _ATTENTION)
        and _is(layer.mlp, _MLPS)
        and _is(layer.input_layernorm, _NORMS)
        and _is(layer.post_attention_layernorm, _NORMS)
        for layer in decoder.layers
    )


def _is(module: Module, names: set[str]) -> bool:
    return type(module).__name__ in names and type(module).__module__.startswith("transformers.models.")


class LeanDecoder:
    """Runs the decoder of one base; attention goes through the base's `PassContext`, as in the generic forward."""

    def __init__(self, model: PreTrainedModel, context: PassContext) -> None:
        """Use the modules of `model`, which `matches`."""
        self._decoder: Module = model.get_decoder()  # type: ignore[no-untyped-call]
        self.context = context

    def __call__(
        self,
        tokens_P: Tensor,
        positions_P: Tensor,
        segments: Sequence[Segment],
        anchor_1: Tensor,
        checkpoint: bool = False,
    ) -> Tensor:
        """Return final-norm hidden states x_PD; `anchor_1` requires a gradient, so that the node gets a backward.

        With `checkpoint` a layer keeps its input alone and runs again, on the same kernels, before its backward.
        """
        if torch.is_grad_enabled():
            x_PD: Tensor = _Stack.apply(anchor_1, self, tokens_P, positions_P, segments, checkpoint)  # type: ignore[no-untyped-call]
            return x_PD
        return self.infer(tokens_P, positions_P, segments)

    def infer(self, tokens_P: Tensor, positions_P: Tensor, segments: Sequence[Segment]) -> Tensor:
        """Return x_PD without a graph."""
        return self.forward(tokens_P, positions_P, segments, None)[0]

    def forward(
        self,
        tokens_P: Tensor,
        positions_P: Tensor,
        segments: Sequence[Segment],
        keep: list[_LayerSaved | Tensor] | None,
        checkpoint: bool = False,
    ) -> tuple[Tensor, _NormSaved, tuple[Tensor, Tensor]]:
        """Return x_PD, what the last norm saved and the rotary factors; append to `keep` unless it is None."""
        x_PD: Tensor = self._decoder.embed_tokens(tokens_P)
        cosine_1Pd, sine_1Pd = self._decoder.rotary_emb(x_PD, positions_P.unsqueeze(0))
        sine_1Pd[..., : sine_1Pd.shape[-1] // 2].neg_()
        rotary = (cosine_1Pd[0].unsqueeze(1), sine_1Pd[0].unsqueeze(1))
        for layer in self._decoder.layers:
            input_PD = x_PD
            x_PD, saved = self._layer(layer, input_PD, rotary, segments, keep is not None)
            if keep is not None:
                keep.append(input_PD if checkpoint else saved)
            del saved  # else a checkpoint's would live on beside the next layer's
        x_PD, norm = _norm(self._decoder.norm, x_PD)
        return x_PD, norm, rotary

    def _layer(
        self,
        layer: Module,
        x_PD: Tensor,
        rotary: tuple[Tensor, Tensor],
        segments: Sequence[Segment],
        with_grad: bool,
    ) -> tuple[Tensor, _LayerSaved]:
        module, mlp = layer.self_attn, layer.mlp
        y_PD, input_norm = _norm(layer.input_layernorm, x_PD)
        (q_PI, k_PI, v_PI), qkv = _project((module.q_proj, module.k_proj, module.v_proj), y_PD, segments)
        q_PHd, k_PGd, v_PGd = (z_PI.view(z_PI.shape[0], -1, module.head_dim) for z_PI in (q_PI, k_PI, v_PI))
        q_norm = k_norm = None
        if hasattr(module, "q_norm"):
            q_PHd, q_norm = _norm(module.q_norm, q_PHd)
            k_PGd, k_norm = _norm(module.k_norm, k_PGd)
        q_PHd, k_PGd = _rotate(q_PHd, *rotary), _rotate(k_PGd, *rotary)
        attention = self._attend(module, q_PHd, k_PGd, v_PGd, with_grad)
        (z_PD,), o = _project((module.o_proj,), attention.o_PHd.detach().reshape(x_PD.shape[0], -1), segments)
        x_PD = z_PD.add_(x_PD)
        y_PD, post_norm = _norm(layer.post_attention_layernorm, x_PD)
        (gate_PF, up_PF), gate_up = _project((mlp.gate_proj, mlp.up_proj), y_PD, segments)
        silu_PF = F.silu(gate_PF)
        (z_PD,), down = _project((mlp.down_proj,), silu_PF * up_PF, segments)
        saved = _LayerSaved(
            input_norm, qkv, q_norm, k_norm, attention, o, post_norm, gate_up, gate_PF, silu_PF, up_PF, down.lows
        )  # fmt: skip
        return z_PD.add_(x_PD), saved

    def _attend(self, module: Module, q_PHd: Tensor, k_PGd: Tensor, v_PGd: Tensor, with_grad: bool) -> _AttentionSaved:
        """Run the plan; with gradients, under a graph of its own that ends in q, k and v."""
        if with_grad:
            q_PHd, k_PGd, v_PGd = (leaf.detach().requires_grad_() for leaf in (q_PHd, k_PGd, v_PGd))
        with torch.set_grad_enabled(with_grad):
            o_PHd = self.context.attend(module, q_PHd, k_PGd, v_PGd, getattr(module, "sliding_window", None))
        return _AttentionSaved(q_PHd, k_PGd, v_PGd, o_PHd)

    def backward(
        self,
        g_PD: Tensor,
        keep: list[_LayerSaved | Tensor],
        norm: _NormSaved,
        rotary: tuple[Tensor, Tensor],
        segments: Sequence[Segment],
    ) -> None:
        """Accumulate the segments' gradients; empties `keep` from its end."""
        g_PD = _norm_backward(self._decoder.norm, g_PD, norm)
        for index in reversed(range(len(keep))):
            layer, saved = self._decoder.layers[index], keep.pop()
            if isinstance(saved, Tensor):
                saved = self._layer(layer, saved, rotary, segments, with_grad=True)[1]
            g_PD = _layer_backward(layer, g_PD, saved, rotary, segments, index > 0)
            del saved


def _layer_backward(
    layer: Module,
    g_PD: Tensor,
    saved: _LayerSaved,
    rotary: tuple[Tensor, Tensor],
    segments: Sequence[Segment],
    need_input: bool,
) -> Tensor:
    """Return the gradient of the layer's input; without `need_input` only what the adapters need is computed."""
    module, mlp = layer.self_attn, layer.mlp
    # The input of down is multiplied again rather than kept: that is quicker than computing SiLU again.
    down = _LinearSaved(saved.silu_PF * saved.up_PF, saved.down)
    g_PF = _project_backward((mlp.down_proj,), (g_PD,), down, segments)
    g_up_PF = saved.silu_PF.mul_(g_PF)
    g_gate_PF = torch.ops.aten.silu_backward(g_PF.mul_(saved.up_PF), saved.gate_PF)
    z_PD = _project_backward((mlp.gate_proj, mlp.up_proj), (g_gate_PF, g_up_PF), saved.gate_up, segments)
    g_PD = _norm_backward(layer.post_attention_layernorm, z_PD, saved.post_norm).add_(g_PD)
    g_o_PI = _project_backward((module.o_proj,), (g_PD,), saved.o, segments)
    attention = saved.attention
    g_q_PHd, g_k_PGd, g_v_PGd = torch.autograd.grad(
        attention.o_PHd, (attention.q_PHd, attention.k_PGd, attention.v_PGd), g_o_PI.view(attention.o_PHd.shape)
    )
    cosine_P1d, sine_P1d = rotary
    g_q_PHd, g_k_PGd = _rotate(g_q_PHd, cosine_P1d, -sine_P1d), _rotate(g_k_PGd, cosine_P1d, -sine_P1d)
    if saved.q_norm is not None and saved.k_norm is not None:
        g_q_PHd = _norm_backward(module.q_norm, g_q_PHd, saved.q_norm)
        g_k_PGd = _norm_backward(module.k_norm, g_k_PGd, saved.k_norm)
    gradients = tuple(g_Phd.reshape(g_PD.shape[0], -1) for g_Phd in (g_q_PHd, g_k_PGd, g_v_PGd))
    linears = (module.q_proj, module.k_proj, module.v_proj)
    if not need_input:
        _project_backward(linears, gradients, saved.qkv, segments, need_input=False)
        return g_PD
    z_PD = _project_backward(linears, gradients, saved.qkv, segments)
    return _norm_backward(layer.input_layernorm, z_PD, saved.input_norm).add_(g_PD)


class _Stack(torch.autograd.Function):
    """The decoder as one node."""

    @staticmethod
    def forward(
        ctx: Any,  # autograd's context
        anchor_1: Tensor,
        lean: LeanDecoder,
        tokens_P: Tensor,
        positions_P: Tensor,
        segments: Sequence[Segment],
        checkpoint: bool,
    ) -> Tensor:
        ctx.keep = []
        x_PD, ctx.norm, ctx.rotary = lean.forward(tokens_P, positions_P, segments, ctx.keep, checkpoint)
        ctx.lean, ctx.segments = lean, segments
        ctx.plan, ctx.num_tokens = lean.context.plan, lean.context.num_tokens
        return x_PD

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, None, None, None, None, None]:
        with ctx.lean.context.using(ctx.plan, ctx.num_tokens):
            ctx.lean.backward(grad_outputs[0].contiguous(), ctx.keep, ctx.norm, ctx.rotary, ctx.segments)
        return None, None, None, None, None, None


def _project(
    linears: Sequence[SegmentedLinear], x_PI: Tensor, segments: Sequence[Segment]
) -> tuple[list[Tensor], _LinearSaved]:
    outputs, lows = linears[0].project_group(linears, x_PI, segments)
    return outputs, _LinearSaved(x_PI, lows)


def _project_backward(
    linears: Sequence[SegmentedLinear],
    gradients: Sequence[Tensor],
    saved: _LinearSaved,
    segments: Sequence[Segment],
    need_input: bool = True,
) -> Tensor:
    """Return the gradient of the input that the linears share; an empty tensor if it is not needed."""
    g_PI = linears[0].group_backward(linears, gradients, saved.x_PI, saved.lows, segments, need_input)
    return saved.x_PI.new_empty(0) if g_PI is None else g_PI


def _norm(norm: Module, x: Tensor) -> tuple[Tensor, _NormSaved]:
    """Normalise the last dimension in float32; products and sums, never fused, so that every row rounds alike."""
    x_float = x.float()
    factor = x_float.square().mean(dim=-1, keepdim=True).add_(norm.variance_epsilon).rsqrt_()
    y = (x_float * factor).to(x.dtype)
    return y.mul_(norm.weight), _NormSaved(x, factor)


def _norm_backward(norm: Module, g: Tensor, saved: _NormSaved) -> Tensor:
    g_unit = g.float() * norm.weight.float()
    unit = saved.x.float() * saved.factor
    along = (g_unit * unit).mean(dim=-1, keepdim=True)
    g_x: Tensor = g_unit.sub_(unit.mul_(along)).mul_(saved.factor).to(g.dtype)
    return g_x


def _rotate(x_Phd: Tensor, cosine_P1d: Tensor, sine_P1d: Tensor) -> Tensor:
    """Turn each head's pairs (i, i + d/2), by a sine whose first half is negated; its negative turns them back."""
    half = x_Phd.shape[-1] // 2
    other_Phd = torch.cat((x_Phd[..., half:], x_Phd[..., :half]), dim=-1)
    return other_Phd.mul_(sine_P1d).add_(x_Phd * cosine_P1d)
