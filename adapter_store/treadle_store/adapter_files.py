"""Checks the files of an uploaded PEFT adapter without loading a tensor: names, config, safetensors header.

Knows the formats, not where the bytes lie: it is given the config's bytes and a reader of byte ranges.
"""

import json
import math
from collections.abc import Callable
from typing import Any, Final, TypeGuard

from treadle import names
from treadle.errors import TreadleError, make_error
from treadle.v1 import types_pb2

CONFIG_FILE: Final = "adapter_config.json"
WEIGHTS_FILE: Final = "adapter_model.safetensors"
REVISION_FILES: Final = (CONFIG_FILE, WEIGHTS_FILE)
MAX_CONFIG_BYTES: Final = 2**20
MAX_HEADER_BYTES: Final = 16 * 2**20

_ITEM_BYTES: Final = {"F32": 4, "F16": 2, "BF16": 2}
# Where the rank stands in a tensor's shape: A maps the input to the rank, B the rank to the output.
_RANK_AXIS: Final = {".lora_A.weight": 0, ".lora_B.weight": 1}
_PARTNER: Final = {".lora_A.weight": ".lora_B.weight", ".lora_B.weight": ".lora_A.weight"}

ReadRange = Callable[[int, int], bytes]


def bad_file(text: str) -> TreadleError:
    """Returns a BAD_ADAPTER_FILE."""
    return make_error("BAD_ADAPTER_FILE", text)


def check_config(content: bytes, base: str, lora: types_pb2.LoraConfig) -> None:
    """Raises BAD_ADAPTER_FILE unless adapter_config.json is a plain LoRA of this base, rank and alpha."""
    config = _parse_object(content, CONFIG_FILE)
    if config.get("peft_type") != "LORA":
        raise bad_file(f"{CONFIG_FILE} has peft_type {_show(config.get('peft_type'))}; only LORA is taken")
    if config.get("r") != lora.rank or isinstance(config.get("r"), bool):
        raise bad_file(f"{CONFIG_FILE} has r {_show(config.get('r'))}, the run has rank {lora.rank}")
    alpha = config.get("lora_alpha")
    # The run's alpha is a float32, the file's number need not be one.
    if not isinstance(alpha, int | float) or not math.isclose(alpha, lora.alpha, rel_tol=1e-6):
        raise bad_file(f"{CONFIG_FILE} has lora_alpha {_show(alpha)}, the run has alpha {lora.alpha:g}")
    for name, plain in (("use_dora", False), ("use_rslora", False), ("bias", "none")):
        if config.get(name, plain) not in (plain, None):
            raise bad_file(f"{CONFIG_FILE} has {name} {_show(config[name])}; only {plain!r} is taken")
    for name in ("rank_pattern", "alpha_pattern", "modules_to_save"):
        if config.get(name):
            raise bad_file(f"{CONFIG_FILE} sets {name}; an adapter here has one rank and LoRA weights only")
    named = config.get("base_model_name_or_path")
    # Folders and owners differ between machines; the last part of the name is what people keep.
    if isinstance(named, str) and named and _last_part(named) != _last_part(names.plain_base(base)):
        raise bad_file(f"{CONFIG_FILE} belongs to the base {named[:200]!r}, the run trains {base!r}")


def check_weights(size: int, read: ReadRange, rank: int) -> None:
    """Raises BAD_ADAPTER_FILE unless the safetensors file is whole and holds pairs of LoRA matrices of this rank."""
    prefix = read(0, 8)
    header_bytes = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or not 2 <= header_bytes <= min(size - 8, MAX_HEADER_BYTES):
        raise bad_file(f"{WEIGHTS_FILE} does not begin with a safetensors header; is it the right file?")
    header = _parse_object(read(8, header_bytes), WEIGHTS_FILE)
    header.pop("__metadata__", None)
    if not header:
        raise bad_file(f"{WEIGHTS_FILE} holds no tensors")
    spans = sorted(_check_tensor(name, entry, rank) for name, entry in header.items())
    end = 0
    for begin, stop in spans:
        if begin != end:
            raise bad_file(f"{WEIGHTS_FILE} has a gap or an overlap at byte {end} of its data")
        end = stop
    if end != size - 8 - header_bytes:
        raise bad_file(f"{WEIGHTS_FILE} has {size - 8 - header_bytes} bytes of data, its header describes {end}")
    for name in header:
        suffix = next(suffix for suffix in _RANK_AXIS if name.endswith(suffix))
        if name.removesuffix(suffix) + _PARTNER[suffix] not in header:
            raise bad_file(f"{WEIGHTS_FILE} has {name[:200]!r} without its {_PARTNER[suffix]}")


def _check_tensor(name: str, entry: object, rank: int) -> tuple[int, int]:
    """Returns the byte range of a tensor whose name, type, shape and length agree."""
    suffix = next((suffix for suffix in _RANK_AXIS if name.endswith(suffix)), None)
    if suffix is None:
        raise bad_file(f"{WEIGHTS_FILE} has a tensor {name[:200]!r}; only lora_A.weight and lora_B.weight are taken")
    if not isinstance(entry, dict):
        raise bad_file(f"{WEIGHTS_FILE} describes {name[:200]!r} by something else than an object")
    dtype, shape, span = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    item_bytes = _ITEM_BYTES.get(dtype) if isinstance(dtype, str) else None
    if item_bytes is None:
        raise bad_file(f"{name[:200]!r} has the type {_show(dtype)}; use F32, F16 or BF16")
    if not _is_sizes(shape) or not _is_sizes(span) or shape[_RANK_AXIS[suffix]] != rank:
        raise bad_file(f"{name[:200]!r} has the shape {_show(shape)}; axis {_RANK_AXIS[suffix]} of two must be {rank}")
    begin, end = span
    if end - begin != shape[0] * shape[1] * item_bytes or begin == end:
        raise bad_file(f"{name[:200]!r} of shape {_show(shape)} does not fill the bytes {begin} to {end}")
    return begin, end


def _is_sizes(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and len(value) == 2 and all(type(n) is int and 0 <= n < 2**48 for n in value)


def _parse_object(content: bytes, path: str) -> dict[str, Any]:  # JSON values are of any type
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise bad_file(f"{path} is not valid JSON where it should be: {str(error)[:100]}") from None
    if not isinstance(value, dict):
        raise bad_file(f"{path} does not hold a JSON object")
    return value


def _last_part(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].lower()


def _show(value: object) -> str:
    return repr(value)[:100]
