"""Safetensors files, written in pieces and read where they lie: tens of megabytes without a copy in between.

The bytes are those that `safetensors` itself writes; that would copy the tensors twice, which takes longer than
everything else that is done with them. Knows nothing of what the tensors are.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors import torch as safetensors_torch
from torch import Tensor

from treadle_engine.errors import EngineError

_DTYPE_CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}


def to_parts(tensors: Mapping[str, Tensor]) -> list[memoryview]:
    """Return a file in pieces, in the order given; the tensors are uncopied where they lie contiguous on the CPU."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # JSON values
    parts: list[memoryview] = []
    end = 0
    for name, tensor in tensors.items():
        part = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
        offsets = [end, end + part.nbytes]
        header[name] = {"dtype": _DTYPE_CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        parts.append(part)
        end += part.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return [memoryview(len(text).to_bytes(8, "little")), memoryview(text), *parts]


def write_parts(path: Path, parts: Sequence[memoryview]) -> int:
    """Write a new file and return its length in bytes; OSError when it cannot be written."""
    size = sum(part.nbytes for part in parts)
    with path.open("xb") as file:
        # Blocks that are asked for at once are written several times faster than those that a file grows by.
        os.posix_fallocate(file.fileno(), 0, size)
        for part in parts:
            file.write(part)
    return size


def read_tensors(file: bytes | Path, what: str) -> dict[str, Tensor]:
    """Return the tensors of `what`; of a path they are views of the mapped file. BAD_ADAPTER_FILE if it is none."""
    try:
        if isinstance(file, bytes):
            return safetensors_torch.load(file)
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise EngineError("BAD_ADAPTER_FILE", f"{what} is not a safetensors file: {error}") from error
