"""Frozen weights in 8 or 4 bits, unpacked into the compute dtype wherever a product needs them.

int8 has one scale per output row (its absmax / 127), nf4 is the 4-bit NormalFloat of QLoRA (Dettmers et al., 2023) with
one scale per 64 values; both are packed by bitsandbytes. Only weights are quantized, never activations: the products
stay those of the compute dtype, so a row's result does not depend on its neighbours. Knows nothing of models.
"""

# Shape suffix legend
#   O / I = out / in features, B64 = blocks of 64 values

from __future__ import annotations

import math
from typing import Final, Literal, Protocol, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from treadle_engine.errors import EngineError

Quantization = Literal["none", "int8", "nf4"]

_NF4_BLOCK: Final = 64


class PackedWeight(Protocol):
    """A weight matrix in fewer bits."""

    @property
    def num_bytes(self) -> int:
        """Memory held, in bytes."""
        ...

    def unpack(self) -> Tensor:
        """Return W [O, I] in compute dtype; the next call on any weight of the same base may overwrite it."""
        ...


class Scratch:
    """Buffers that all weights of one base unpack into: fresh memory for each product would cost page faults."""

    def __init__(self) -> None:
        """Start empty; buffers grow to the largest weight."""
        self._buffers: dict[torch.dtype, Tensor] = {}

    def take(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return uninitialised memory; what was taken in this dtype before is given up."""
        count = math.prod(shape)
        buffer = self._buffers.get(dtype)
        if buffer is None or buffer.numel() < count:
            buffer = self._buffers[dtype] = torch.empty(count, dtype=dtype, device=device)
        return buffer[:count].view(shape)


class Int8Weight:
    """Eight bits per value and one float32 scale per row."""

    def __init__(self, weight_OI: Tensor, device: torch.device, scratch: Scratch) -> None:
        """Pack a float weight and put the result on `device`."""
        from bitsandbytes import functional

        values_OI, absmax_O, _ = functional.int8_vectorwise_quant(weight_OI)
        self._values_OI: Tensor = values_OI.to(device)
        self._scale_O1: Tensor = (absmax_O.float() / 127.0).unsqueeze(1).to(device)
        self._dtype = weight_OI.dtype
        self._scratch = scratch

    @property
    def num_bytes(self) -> int:
        """Memory held, in bytes."""
        return self._values_OI.nbytes + self._scale_O1.nbytes

    def unpack(self) -> Tensor:
        """Return W [O, I], multiplied out in float32 and rounded once."""
        shape, device = self._values_OI.shape, self._values_OI.device
        wide_OI = self._scratch.take(shape, torch.float32, device).copy_(self._values_OI).mul_(self._scale_O1)
        if self._dtype == torch.float32:
            return wide_OI
        return self._scratch.take(shape, self._dtype, device).copy_(wide_OI)


class Nf4Weight:
    """Four bits per value and one float32 scale per block of 64."""

    def __init__(self, weight_OI: Tensor, device: torch.device) -> None:
        """Pack a float weight and put the result on `device`."""
        from bitsandbytes import functional

        # Rows of one block each: the library's AVX-512 kernel takes wrong scales where a block spans two rows.
        blocks_B64 = F.pad(weight_OI.reshape(-1), (0, -weight_OI.numel() % _NF4_BLOCK)).view(-1, _NF4_BLOCK)
        packed, state = functional.quantize_4bit(blocks_B64, blocksize=_NF4_BLOCK, quant_type="nf4")
        self._shape = weight_OI.shape
        self._packed: Tensor = packed.to(device)
        self._state = state
        state.to(device)  # type: ignore[no-untyped-call]
        self._dequantize = functional.dequantize_4bit

    @property
    def num_bytes(self) -> int:
        """Memory held, in bytes."""
        return self._packed.nbytes + int(self._state.absmax.nbytes)

    def unpack(self) -> Tensor:
        """Return W [O, I]: each value's level times its block's scale."""
        values = self._dequantize(self._packed, self._state).view(-1)
        return values[: self._shape.numel()].view(self._shape)


class PackedLinear(nn.Linear):
    """A linear whose weight exists only packed; it has no forward of its own."""

    packed: PackedWeight

    def __init__(self, linear: nn.Linear, packed: PackedWeight) -> None:
        """Stand in for `linear`, keeping its bias."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_parameter("weight", None)
        self.bias = linear.bias
        self.packed = packed


def check_quantization(value: str) -> Quantization:
    """Return `value`, or raise BAD_VALUE."""
    if value not in get_args(Quantization):
        raise EngineError("BAD_VALUE", f"quantize must be one of {', '.join(get_args(Quantization))}, got {value!r}")
    return cast(Quantization, value)


@torch.no_grad()
def pack(linear: nn.Linear, kind: Quantization, device: torch.device, scratch: Scratch) -> nn.Linear:
    """Return a linear with the packed weight on `device`; packed on the CPU, so that it is the same on every device."""
    if kind == "none":
        return linear
    weight_OI = linear.weight.detach().cpu()
    packed = Int8Weight(weight_OI, device, scratch) if kind == "int8" else Nf4Weight(weight_OI, device)
    return PackedLinear(linear, packed)
