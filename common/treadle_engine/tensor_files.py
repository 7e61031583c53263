"""Safetensors files, written in pieces and read where they lie: tens of megabytes without a copy in between.

The bytes are those that `safetensors` itself writes; that would copy the tensors twice, which takes longer than
everything else that is done with them. Knows nothing of what the tensors are.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors import torch as safetensors_torch
from torch import Tensor

from treadle_engine.errors import EngineError

_DTYPE_CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}


class Parts:
    """A file in pieces, made one by one: of the tensors that must be copied, one copy is there at a time."""

    def __init__(self, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> None:
        """Lay the file out; with a `dtype` the tensors are converted to it."""
        self._tensors, self._dtype = list(tensors.values()), dtype
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # JSON values
        end = 0
        for name, tensor in tensors.items():
            kept = dtype or tensor.dtype
            begin, end = end, end + tensor.numel() * kept.itemsize
            header[name] = {"dtype": _DTYPE_CODES[kept], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._header = len(text).to_bytes(8, "little") + text
        self.num_bytes = len(self._header) + end
        """Length of the file."""

    def __iter__(self) -> Iterator[memoryview]:
        """Yield the pieces; a tensor is uncopied where it lies contiguous on the CPU in the right dtype."""
        yield memoryview(self._header)
        for tensor in self._tensors:
            yield tensor.detach().to("cpu", self._dtype).contiguous().flatten().view(torch.uint8).numpy().data


def write_parts(path: Path, parts: Parts) -> None:
    """Write a file, a new one or over one that is there; OSError when it cannot be written."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    with os.fdopen(descriptor, "wb") as file:
        # Blocks that are asked for at once are written several times faster than those that a file grows by.
        os.posix_fallocate(descriptor, 0, parts.num_bytes)
        for part in parts:
            file.write(part)
        file.truncate()


def read_tensors(file: bytes | Path, what: str) -> dict[str, Tensor]:
    """Return the tensors of `what`; of a path they are views of the mapped file. BAD_ADAPTER_FILE if it is none."""
    try:
        if isinstance(file, bytes):
            return safetensors_torch.load(file)
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise EngineError("BAD_ADAPTER_FILE", f"{what} is not a safetensors file: {error}") from error
