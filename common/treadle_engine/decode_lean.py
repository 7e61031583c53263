"""The decoder of Llama, Qwen2 and Qwen3 for decoding on a CPU: `lean.py`'s forward with kernels between its products.

A step has few rows: torch's norms, rotations and gates would take longer to call than to compute. They differ from
`lean.py`'s by rounding, so a base either always decodes like this or never.
"""

# Shape suffix legend
#   P = rows of the step plus padding, D = hidden, H = query heads, G = key/value heads, d = head dimension
#   F = features between gate/up and down

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from treadle_engine.cpu_kernels import LIKE, gate, normalise, rotate
from treadle_engine.kernel_threads import share_rows
from treadle_engine.lean import LeanDecoder
from treadle_engine.lora import Segment, SegmentedLinear

_NORM_WORK, _ROTATE_WORK, _GATE_WORK = 4, 4, 16
"""Operations per element, as so many multiplications of a product."""

Module = Any  # modules of transformers, whose attributes nn.Module does not type


class DecodeLean(LeanDecoder):
    """Runs the decoder of one base without gradients."""

    def infer(self, tokens_P: Tensor, positions_P: Tensor, segments: Sequence[Segment]) -> Tensor:
        """Return final-norm hidden states x_PD."""
        decoder = self._decoder
        x_PD: Tensor = decoder.embed_tokens(tokens_P).contiguous()
        cosine_1Pd, sine_1Pd = decoder.rotary_emb(x_PD, positions_P.unsqueeze(0))
        rotary = cosine_1Pd[0].contiguous(), sine_1Pd[0].contiguous()
        y_PD, z_PD = torch.empty_like(x_PD), None
        for layer in decoder.layers:
            module, mlp = layer.self_attn, layer.mlp
            _normalise(layer.input_layernorm, x_PD, z_PD, y_PD)
            o_PI = self._attention(module, y_PD, rotary, segments)
            (z_PD,) = _project((module.o_proj,), o_PI, segments)
            _normalise(layer.post_attention_layernorm, x_PD, z_PD, y_PD)
            gate_PF, up_PF = _project((mlp.gate_proj, mlp.up_proj), y_PD, segments)
            _gate(gate_PF, up_PF)
            (z_PD,) = _project((mlp.down_proj,), gate_PF, segments)
        _normalise(decoder.norm, x_PD, z_PD, y_PD)
        return y_PD

    def _attention(
        self, module: Module, y_PD: Tensor, rotary: tuple[Tensor, Tensor], segments: Sequence[Segment]
    ) -> Tensor:
        """Return what the heads give, side by side."""
        rows, width = y_PD.shape[0], module.head_dim
        q_PI, k_PI, v_PI = _project((module.q_proj, module.k_proj, module.v_proj), y_PD, segments)
        q_PHd, k_PGd, v_PGd = (z_PI.view(rows, -1, width) for z_PI in (q_PI, k_PI, v_PI))
        for norm, x_Phd in ((getattr(module, "q_norm", None), q_PHd), (getattr(module, "k_norm", None), k_PGd)):
            if norm is not None:
                _normalise(norm, x_Phd, None, x_Phd)
            _rotate(x_Phd, *rotary)
        o_PHd = self.context.attend(module, q_PHd, k_PGd, v_PGd, getattr(module, "sliding_window", None))
        return o_PHd.reshape(rows, -1)


def compile_kernels(dtype: torch.dtype) -> None:
    """Compile the kernels for a base of float32 or bfloat16, or load them from disk."""
    like = LIKE[dtype]
    normalise(like, 0, 0, 0, 1, 0, np.float32(1.0), 0)
    rotate(like, 0, 0, 1, 2, 0, 0)
    gate(like, 0, 0, 0)


def _project(linears: Sequence[SegmentedLinear], x_PI: Tensor, segments: Sequence[Segment]) -> list[Tensor]:
    return linears[0].project_group(linears, x_PI, segments)[0]


def _normalise(norm: Module, x: Tensor, z: Tensor | None, y: Tensor) -> None:
    """Write the norm over the last dimension of x to y, after adding z to x."""
    like, width = LIKE[x.dtype], x.shape[-1]
    at_x, at_y, at_weight = x.data_ptr(), y.data_ptr(), norm.weight.data_ptr()
    at_z = 0 if z is None else z.data_ptr()
    epsilon = np.float32(norm.variance_epsilon)

    def run(first: int, rows: int) -> None:
        offset = x.itemsize * width * first
        normalise(like, at_x + offset, at_z + offset if at_z else 0, rows, width, at_weight, epsilon, at_y + offset)

    share_rows(x.numel() // width, _NORM_WORK * width, run)


def _rotate(x_Phd: Tensor, cosine_Pd: Tensor, sine_Pd: Tensor) -> None:
    """Turn each head's pairs (i, i + d/2) in place."""
    like = LIKE[x_Phd.dtype]
    rows, heads, width = x_Phd.shape
    at_x, at_cosine, at_sine = x_Phd.data_ptr(), cosine_Pd.data_ptr(), sine_Pd.data_ptr()

    def run(first: int, count: int) -> None:
        offset = x_Phd.itemsize * width * first
        rotate(like, at_x + offset * heads, count, heads, width, at_cosine + offset, at_sine + offset)

    share_rows(rows, _ROTATE_WORK * heads * width, run)


def _gate(gate_PF: Tensor, up_PF: Tensor) -> None:
    """Replace the gate by silu(gate) * up."""
    like = LIKE[gate_PF.dtype]
    rows, width = gate_PF.shape
    at_gate, at_up = gate_PF.data_ptr(), up_PF.data_ptr()

    def run(first: int, count: int) -> None:
        offset = gate_PF.itemsize * width * first
        gate(like, at_gate + offset, at_up + offset, count * width)

    share_rows(rows, _GATE_WORK * width, run)
