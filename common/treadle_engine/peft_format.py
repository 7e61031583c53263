"""Adapters as PEFT folders: `adapter_config.json` and `adapter_model.safetensors`, both ways.

What is written loads in `peft` and vLLM; what is read may come from anyone, so only safetensors are opened and
everything is checked. This module does not know revisions, stores or optimizers.
"""

from __future__ import annotations

import functools
import json
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from treadle_engine.base_model import KnownBase
from treadle_engine.errors import EngineError
from treadle_engine.lora import MAX_RANK, AdapterWeights, LoraConfig, LoraSite, tensor_name
from treadle_engine.spare_buffers import SpareBuffers
from treadle_engine.tensor_files import Parts, read_tensors

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_PREFIX = "base_model.model."
# Features of PEFT that change what an adapter computes and that have no place in the flat layout.
_UNSUPPORTED = (
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


def to_files(base: KnownBase, weights: AdapterWeights, dtype: torch.dtype = torch.float32) -> dict[str, bytes]:
    """Return the two files of a PEFT folder, by name."""
    return {
        CONFIG_FILE: config_file(base, weights.config),
        WEIGHTS_FILE: b"".join(weights_parts(weights, dtype)),
    }


def config_file(base: KnownBase, config: LoraConfig) -> bytes:
    """Return `adapter_config.json` of adapters with this configuration."""
    targets = _target_modules(base.sites, base.lora_sites(config))
    return _config_file(base.info.plain_name, config, tuple(targets))


def weights_parts(weights: AdapterWeights, dtype: torch.dtype) -> Parts:
    """Return `adapter_model.safetensors` in pieces."""
    named = sorted(weights.to_tensors().items())
    return Parts({f"{_PREFIX}{name}": tensor for name, tensor in named}, dtype)


def from_files(base: KnownBase, files: Mapping[str, bytes | Path], spare: SpareBuffers | None = None) -> AdapterWeights:
    """Read a PEFT adapter; BAD_ADAPTER_FILE if it is malformed, INCOMPATIBLE_ADAPTER if the base has no place for it.

    A file is given by its bytes or by where it lies; from there the weights are mapped, not read into memory first.
    Rank, alpha and trained kinds come from the file. A site that its kind covers but the file lacks starts as in a
    new adapter: B zero, so that logits are those of the file. A buffer for them is taken from `spare` if it has one.
    """
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if name not in files:
            raise EngineError("BAD_ADAPTER_FILE", f"{name} is missing; only safetensors are read")
    settings_file = files[CONFIG_FILE]
    settings = _parse_config(settings_file if isinstance(settings_file, bytes) else settings_file.read_bytes())
    named = _strip(read_tensors(files[WEIGHTS_FILE], WEIGHTS_FILE))
    config = _lora_config(base, settings, named)
    for name, value in named.items():
        if value.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise EngineError("BAD_ADAPTER_FILE", f"{name} is not a float tensor")
    if _lacks_sites(base, config, named):
        named = {**AdapterWeights.init(base, config).to_tensors(), **named}
    weights = AdapterWeights.from_tensors(base, config, named, spare)
    # One sweep over the whole buffer; extremes of what holds a NaN or an infinity are not finite.
    if not all(math.isfinite(extreme) for extreme in torch.aminmax(weights.flat)):
        wrong = [name for name, value in weights.to_tensors().items() if not bool(value.isfinite().all())]
        raise EngineError("BAD_ADAPTER_FILE", f"values that are not finite numbers: {wrong[:3]}")
    return weights


def save_adapter(folder: Path, base: KnownBase, weights: AdapterWeights, dtype: torch.dtype = torch.float32) -> None:
    """Write a PEFT folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in to_files(base, weights, dtype).items():
        (folder / name).write_bytes(content)


def load_adapter(folder: Path, base: KnownBase) -> AdapterWeights:
    """Read a PEFT folder; see `from_files`."""
    names = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if (folder / name).is_file()]
    return from_files(base, {name: (folder / name).read_bytes() for name in names})


def _lacks_sites(base: KnownBase, config: LoraConfig, named: Mapping[str, Tensor]) -> bool:
    """Tell whether a site that the configuration covers has no weights in the file."""
    return any(tensor_name(site, letter) not in named for site in base.lora_sites(config) for letter in "AB")


@functools.lru_cache(maxsize=64)
def _config_file(base_name: str, config: LoraConfig, target_modules: tuple[str, ...]) -> bytes:
    # Importing PEFT takes seconds, which a process should not spend before it has an adapter to write.
    import peft

    written = peft.LoraConfig(
        r=config.rank,
        # PEFT declares an integer; a fraction is written only where the run has one.
        lora_alpha=int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,  # type: ignore[arg-type]
        target_modules=list(target_modules),
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_name,
        inference_mode=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        written.save_pretrained(folder)
        settings = json.loads((Path(folder) / CONFIG_FILE).read_text())
    # PEFT writes a set, in an order of the process's own; an adapter must be the same bytes after a crash.
    settings["target_modules"] = sorted(settings["target_modules"])
    return json.dumps(settings, indent=2, sort_keys=True).encode()


def warm_up() -> None:
    """Do now, on this thread, what the first export would have to wait for: import PEFT."""
    import peft  # noqa: F401


def _target_modules(every: tuple[LoraSite, ...], chosen: tuple[LoraSite, ...]) -> list[str]:
    """Name modules by last component, as vLLM expects, unless that would select more than the chosen ones."""
    last = sorted({site.module_name.rpartition(".")[2] for site in chosen})
    selected = {site.index for site in every if site.module_name.rpartition(".")[2] in last}
    exact = selected == {site.index for site in chosen}
    return last if exact else [site.module_name for site in chosen]


def _parse_config(content: bytes) -> dict[str, Any]:
    try:
        settings = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise EngineError("BAD_ADAPTER_FILE", f"{CONFIG_FILE} is not JSON: {error}") from error
    if not isinstance(settings, dict) or str(settings.get("peft_type", "LORA")).upper() != "LORA":
        raise EngineError("BAD_ADAPTER_FILE", f"{CONFIG_FILE} does not describe a LoRA adapter")
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if type(rank) is not int or type(alpha) not in (int, float):
        raise EngineError("BAD_ADAPTER_FILE", f"{CONFIG_FILE}: r must be an integer and lora_alpha a number")
    if not 1 <= rank <= MAX_RANK:
        raise EngineError("INCOMPATIBLE_ADAPTER", f"rank {rank} is not in 1..{MAX_RANK}")
    used = [name for name in _UNSUPPORTED if settings.get(name)]
    if settings.get("bias", "none") != "none":
        used.append("bias")
    if used:
        raise EngineError("INCOMPATIBLE_ADAPTER", f"the adapter uses PEFT features that are not supported: {used}")
    return settings


def _strip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    wrong = [name for name in tensors if not name.startswith(_PREFIX)]
    if wrong or not tensors:
        raise EngineError("BAD_ADAPTER_FILE", f"tensor names must start with {_PREFIX!r}; found {wrong[:3]}")
    return {name.removeprefix(_PREFIX): value for name, value in tensors.items()}


def _lora_config(base: KnownBase, settings: Mapping[str, Any], named: Mapping[str, Tensor]) -> LoraConfig:
    kinds = {site.kind for site in base.sites if tensor_name(site, "A") in named or tensor_name(site, "B") in named}
    if not kinds:
        raise EngineError("INCOMPATIBLE_ADAPTER", "no tensor of the adapter belongs to a linear of this base")
    alpha = float(settings["lora_alpha"])
    if settings.get("use_rslora"):
        # rsLoRA divides by sqrt(r) where we divide by r.
        alpha *= math.sqrt(settings["r"])
    return LoraConfig(
        rank=settings["r"],
        alpha=alpha,
        train_attn="attn" in kinds,
        train_mlp="mlp" in kinds,
        train_unembed="unembed" in kinds,
    )
