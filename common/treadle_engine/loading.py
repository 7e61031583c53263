"""Reads a base's files into a model of transformers: all of it, or one rank's shard of it.

Weights that a file holds in the dtype that is asked for stay mapped from it, so that processes on one machine share
them. A shard is read row by row from the mapped files: no rank ever holds the whole base. Knows no adapters.
"""

# Shape suffix legend
#   O = output features (or tokens of the vocabulary), X = whatever comes behind them

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils.hub import cached_file

from treadle_engine.attention import IMPLEMENTATION
from treadle_engine.errors import EngineError
from treadle_engine.shards import Shard, ShardedEmbedding, cut


def load_whole(path_or_name: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Return the model with all its weights in the memory of the host; UNKNOWN_BASE if it cannot be read."""
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            path_or_name, dtype=dtype, attn_implementation=IMPLEMENTATION
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise EngineError("UNKNOWN_BASE", f"cannot load {path_or_name!r}: {error}") from error
    if device.type == "cpu":
        _map_weights(model, Path(path_or_name))
    return model


def load_outline(path_or_name: str, dtype: torch.dtype) -> tuple[PreTrainedModel, Path]:
    """Return the model without any weights, and the folder of its files; UNKNOWN_BASE if there is none."""
    try:
        config = AutoConfig.from_pretrained(path_or_name)
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, dtype=dtype, attn_implementation=IMPLEMENTATION
            )
        model.tie_weights()
        folder = Path(str(cached_file(path_or_name, "config.json"))).parent
        model.generation_config = _generation_config(folder) or model.generation_config
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise EngineError("UNKNOWN_BASE", f"cannot load {path_or_name!r}: {error}") from error
    return model, folder


@torch.no_grad()
def load_shard(path_or_name: str, dtype: torch.dtype, shard: Shard) -> tuple[PreTrainedModel, int]:
    """Return the model with this rank's rows of its linears and embedding, and how many parameters the whole has.

    UNKNOWN_BASE if it cannot be read, or if its files do not name their tensors as the model does.
    """
    model, folder = load_outline(path_or_name, dtype)
    embedding = model.get_input_embeddings()
    if not isinstance(embedding, nn.Embedding):
        raise EngineError("UNKNOWN_BASE", "the model has no embedding that could be spread over ranks")
    sharded = {id(embedding.weight)}
    for _, linear in find_linears(model):
        sharded |= {id(parameter) for parameter in linear.parameters()}
    empty = dict(model.named_parameters())
    num_parameters = sum(parameter.numel() for parameter in empty.values())
    for name, stored in _stored(model, folder, set(empty)):
        parameter = empty.pop(name, None)
        if parameter is None:
            continue
        if stored.shape != parameter.shape:
            raise EngineError("UNKNOWN_BASE", f"{name} is {list(stored.shape)}, expected {list(parameter.shape)}")
        own = cut(stored, shard) if id(parameter) in sharded else stored
        place, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(place), attribute, nn.Parameter(own.to(dtype), requires_grad=False))
    if empty:
        raise EngineError(
            "UNKNOWN_BASE",
            f"the files of {path_or_name!r} lack {next(iter(empty))!r}; a base that is spread over ranks must have its "
            "tensors in safetensors files, named as transformers' model names them (save_pretrained writes them so)",
        )
    model.tie_weights()
    model.set_input_embeddings(ShardedEmbedding(embedding, shard))
    return model, num_parameters


def find_linears(model: PreTrainedModel) -> list[tuple[str, nn.Linear]]:
    """Return every linear of the decoder layers, then the unembedding, by name."""
    decoder: nn.Module = model.get_decoder()  # type: ignore[no-untyped-call]
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if not isinstance(head, nn.Linear):
        raise EngineError("UNKNOWN_BASE", "the model has no linear unembedding")
    layers = find_layers(decoder)
    names = {id(module): name for name, module in model.named_modules()}
    prefix = names[id(layers)]
    found = [(f"{prefix}.{name}", child) for name, child in layers.named_modules() if isinstance(child, nn.Linear)]
    return [*found, (names[id(head)], head)]


def find_layers(decoder: nn.Module) -> nn.ModuleList:
    """Return the decoder's list of layers."""
    layers = next((child for child in decoder.children() if isinstance(child, nn.ModuleList)), None)
    if layers is None:
        raise EngineError("UNKNOWN_BASE", "the model has no list of decoder layers")
    return layers


def _generation_config(folder: Path) -> GenerationConfig | None:
    try:
        return GenerationConfig.from_pretrained(str(folder))
    except OSError:
        return None


def _stored(model: PreTrainedModel, folder: Path, names: set[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of the folder's files, mapped, by the model's name for them, where it is one of `names`."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for stored in tensors.keys():  # noqa: SIM118 - not a mapping
                known = next((name for name in _candidates(model, stored) if name in names), None)
                if known is not None:
                    yield known, tensors.get_tensor(stored)


def _candidates(model: PreTrainedModel, stored: str) -> tuple[str, str]:
    """Return the names that the model may have for a tensor of a file, which may be that of its inner model."""
    return stored, f"{model.base_model_prefix}.{stored}"


def _map_weights(model: PreTrainedModel, folder: Path) -> None:
    """Point parameters at the file's memory map where the file holds exactly their bytes.

    Processes on one machine then share one copy. A parameter that was converted on loading stays a private copy.
    """
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a mapping
                    parameter = _parameter(model, name)
                    if parameter is None:
                        continue
                    stored = tensors.get_tensor(name)
                    if stored.dtype == parameter.dtype and torch.equal(stored, parameter.data):
                        parameter.data = stored
        except (SafetensorError, OSError):
            continue


def _parameter(model: PreTrainedModel, stored: str) -> nn.Parameter | None:
    for candidate in _candidates(model, stored):
        try:
            return model.get_parameter(candidate)
        except AttributeError:
            continue
    return None
