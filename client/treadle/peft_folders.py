"""PEFT folders from elsewhere: which shape of adapter they hold, and whether a run here can go on with them.

Reads `adapter_config.json` and the header of `adapter_model.safetensors`; no tensor, no torch.
"""

import json
import math
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from treadle.adapters import PEFT_FILES
from treadle.errors import BadInputError
from treadle.types import LoraConfig

_CONFIG, _WEIGHTS = PEFT_FILES
_MAX_HEADER_BYTES: Final = 64 * 2**20
# Features of PEFT that change what an adapter computes and that runs here do not have.
_UNSUPPORTED: Final = (
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "fan_in_fan_out",
    "layer_replication",
    "lora_bias",
    "trainable_token_indices",
    "target_parameters",
    "use_qalora",
    "alora_invocation_tokens",
)
_UNEMBED: Final = ("lm_head", "embed_out")
_ATTENTION: Final = ("attn", "attention")


def read_shape(folder: Path) -> LoraConfig:
    """Returns rank, scale and trained kinds of the adapter in a PEFT folder; rsLoRA's scale as the plain one.

    Raises:
        BadInputError: it is no PEFT folder of a LoRA adapter that a run here can hold; says which setting is why.
    """
    config = _read_config(folder)
    used = [name for name in _UNSUPPORTED if config.get(name)]
    if config.get("bias", "none") != "none":
        used.append("bias")
    if used:
        raise _refused(folder, f"uses {', '.join(used)}: a run here has one rank and LoRA matrices only")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or not isinstance(alpha, int | float):
        raise _refused(folder, f"{_CONFIG} has r {rank!r} and lora_alpha {alpha!r}; both must be numbers")
    names = _tensor_names(folder)
    unembed = any(part in name for name in names for part in _UNEMBED)
    attention = any(part in name for name in names for part in _ATTENTION)
    mlp = any(not any(part in name for part in (*_UNEMBED, *_ATTENTION)) for name in names)
    # rsLoRA divides by sqrt(r) where a run here divides by r.
    scale = float(alpha) * (math.sqrt(rank) if config.get("use_rslora") else 1.0)
    return LoraConfig(rank, None, unembed, mlp, attention, scale)


@contextmanager
def for_upload(folder: Path, shape: LoraConfig, base: str) -> Iterator[Path]:
    """Gives a folder with the same weights; its configuration has the plain scale and the base as it is called here."""
    config = _read_config(folder)
    config |= {"lora_alpha": shape.alpha, "use_rslora": False, "base_model_name_or_path": base}
    with tempfile.TemporaryDirectory(prefix="treadle-import-") as scratch:
        copy = Path(scratch)
        (copy / _CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True))
        try:
            (copy / _WEIGHTS).symlink_to((folder / _WEIGHTS).absolute())
        except OSError:
            shutil.copyfile(folder / _WEIGHTS, copy / _WEIGHTS)
        yield copy


def _read_config(folder: Path) -> dict[str, Any]:  # Any: JSON.
    for name in PEFT_FILES:
        if not (folder / name).is_file():
            others = sorted(path.name for path in folder.glob("*.bin")) if folder.is_dir() else []
            hint = f"; {others[0]} is a pickle, which is never opened: save it as safetensors" if others else ""
            raise _refused(folder, f"has no {name}{hint}")
    try:
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise _refused(folder, f"{_CONFIG} is not JSON: {error}") from error
    if not isinstance(config, dict) or str(config.get("peft_type", "")).upper() != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise _refused(folder, f"has peft_type {kind!r}; only LORA can be trained here")
    return config


def _tensor_names(folder: Path) -> list[str]:
    """Returns the names in the header of the safetensors file: 8 bytes of length, then JSON."""
    path = folder / _WEIGHTS
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(_MAX_HEADER_BYTES, path.stat().st_size):
            raise _refused(folder, f"{_WEIGHTS} is not a safetensors file")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise _refused(folder, f"{_WEIGHTS} is not a safetensors file: {error}") from error
    names = [name for name in header if name != "__metadata__"] if isinstance(header, dict) else []
    wrong = [name for name in names if not name.endswith((".lora_A.weight", ".lora_B.weight"))]
    if wrong or not names:
        raise _refused(folder, f"{_WEIGHTS} has no LoRA matrices" if not names else f"{_WEIGHTS} has {wrong[0]!r}")
    return names


def _refused(folder: Path, why: str) -> BadInputError:
    return BadInputError(f"{folder} {why}", "BAD_ADAPTER_FILE")
