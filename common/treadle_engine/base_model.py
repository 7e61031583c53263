"""A frozen base model over one packed token stream, with LoRA segments at every linear.

Any decoder-only causal LM of transformers works unpatched: its attention goes through the registered packed
attention, its linears are replaced by `SegmentedLinear`. This module does not know losses, optimizers or sampling.
One thread owns a `BaseModel`: the segments of the call in progress are state of the object.
"""

# Shape suffix legend
#   T = packed tokens, P = T plus padding rows, N = selected rows, D = hidden, V = vocabulary

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig, PreTrainedModel

from treadle_engine.attention import AttentionPlan, PackedCausal, PassContext
from treadle_engine.bases import served_name
from treadle_engine.errors import EngineError
from treadle_engine.lean import LeanDecoder, matches
from treadle_engine.loading import find_layers, find_linears, load_shard, load_whole
from treadle_engine.lora import AdapterBase, LoraConfig, LoraSite, Segment, SegmentedLinear, SiteKind
from treadle_engine.quantize import Quantization, Scratch, check_quantization, pack
from treadle_engine.shards import Shard

ROW_MULTIPLE = 16
"""Streams are padded to this many rows: below 16, CPU BLAS picks kernels by the row count, and bits change."""

# Rotary scalings whose angles depend on the longest sequence of the pass, that is on the neighbours.
_UNSTABLE_ROPE = ("dynamic", "longrope")


_SHARED_INPUT = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})


@dataclass(frozen=True)
class BaseInfo:
    """Facts about a base that do not change; `name` says how it is quantized, `plain_name` is that of its weights."""

    name: str
    plain_name: str
    path: str
    vocab_size: int
    max_context: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    num_parameters: int
    eos_token_ids: tuple[int, ...]


class KnownBase(AdapterBase, Protocol):
    """What adapters and their files must know of a base, whose weights may be elsewhere."""

    @property
    def info(self) -> BaseInfo:
        """Facts about it."""
        ...

    @property
    def sites(self) -> tuple[LoraSite, ...]:
        """All sites, the unembedding last."""
        ...


class BaseModel:
    """A base in memory; read-only but for the segments of the current call."""

    def __init__(self, model: PreTrainedModel, info: BaseInfo, shard: Shard | None = None) -> None:
        """Freeze the model and put segmented linears in place; use `load` to get one."""
        self.info = info
        self.shard = shard
        """This rank's part, if the base is spread over several."""
        self.model = model
        self.device = model.device
        self.dtype = model.dtype
        self.context = PassContext()
        model.requires_grad_(False).train(False)
        self._decoder: nn.Module = model.get_decoder()  # type: ignore[no-untyped-call]
        self.linears, self._sites = _replace_linears(model, shard)
        self._unembed = self.linears[-1]
        self.checkpoint_activations = False
        """Whether a backward runs each layer again instead of keeping what it computed; may change between calls."""
        for layer in find_layers(self._decoder):
            layer.forward = partial(self._run_layer, layer.forward)
        for module in self._decoder.modules():
            if hasattr(module, "layer_idx"):
                module.treadle_context = self.context
        self._anchor = torch.zeros(1, device=self.device, requires_grad=True)
        self.lean = LeanDecoder(model, self.context) if matches(model) else None
        text = model.config.get_text_config()
        # Granite divides the logits, Cohere multiplies them, Gemma 2 soft-caps them.
        self.logit_scale = float(getattr(text, "logit_scale", None) or 1.0) / (
            float(getattr(text, "logits_scaling", None) or 1.0)
        )
        self.logit_cap = float(getattr(text, "final_logit_softcapping", None) or 0.0)

    @classmethod
    def load(
        cls,
        path_or_name: str,
        *,
        name: str | None = None,
        dtype: str = "auto",
        device: str = "cpu",
        quantize: str = "none",
        shard: Shard | None = None,
    ) -> Self:
        """Load a folder or a cached hub name; UNKNOWN_BASE if it is not a causal LM that packed passes can serve.

        `quantize` (none, int8, nf4) packs all linears but the unembedding; such a base is served as `name@quantize`.
        With a `shard` only this rank's part of the weights is loaded; all ranks must load, and call, the same.
        """
        chosen, kind = choose_dtype(dtype, torch.device(device)), check_quantization(quantize)
        if shard is None:
            model = load_whole(path_or_name, chosen, torch.device(device))
            num_parameters = sum(parameter.numel() for parameter in model.parameters())
        else:
            model, num_parameters = load_shard(path_or_name, chosen, shard)
        _refuse_unstable(model)
        info = describe(model, path_or_name, name or Path(path_or_name).name, kind, num_parameters)
        _pack_linears(model, kind, torch.device(device))
        model = model.to(device)  # type: ignore[arg-type]
        base = cls(model, info, shard)
        if shard is not None:
            shard.meet()
        base._check_head()
        return base

    def lora_sites(self, config: LoraConfig) -> tuple[LoraSite, ...]:
        """Return the sites that `config` adapts, by rising index."""
        return tuple(site for site in self._sites if config.covers(site.kind))

    @property
    def sites(self) -> tuple[LoraSite, ...]:
        """All sites of the base; the unembedding is the last."""
        return self._sites

    @property
    def num_bytes(self) -> int:
        """Memory of the weights that this process has, in bytes, mapped files included."""
        packed = (linear.packed for linear in self.linears)
        # A tied unembedding is the embedding: each parameter counts once.
        held = sum(parameter.nbytes for parameter in self.model.parameters())
        return held + sum(weight.num_bytes for weight in packed if weight is not None)

    @property
    def unembedding(self) -> SegmentedLinear:
        """The linear from hidden state to logits."""
        return self._unembed

    def hidden(
        self, tokens_T: Tensor, positions_T: Tensor, attention: AttentionPlan, segments: Sequence[Segment]
    ) -> Tensor:
        """Return final-norm hidden states x_TD; under grad mode the graph ends in the segments' `grads`."""
        num_tokens = tokens_T.shape[0]
        padding = -num_tokens % ROW_MULTIPLE
        tokens_P, positions_P = F.pad(tokens_T, (0, padding)), F.pad(positions_T, (0, padding))
        with self.context.using(attention, num_tokens):
            if self.lean is not None:
                return self.lean(tokens_P, positions_P, segments, self._anchor, self.checkpoint_activations)[
                    :num_tokens
                ]
            with self._using(segments, self.linears[:-1]):
                output = self._decoder(
                    input_ids=tokens_P.unsqueeze(0), position_ids=positions_P.unsqueeze(0), use_cache=False
                )
        x_TD: Tensor = output.last_hidden_state[0, :num_tokens]
        return x_TD

    def logits(self, x_ND: Tensor, segments: Sequence[Segment]) -> Tensor:
        """Return float32 logits l_NV of the given rows; `segments` count in these rows."""
        rows = x_ND.shape[0]
        x_PD = F.pad(x_ND, (0, 0, 0, -rows % ROW_MULTIPLE))
        with self._using(segments, [self._unembed]):
            raw_PV: Tensor = self._unembed(x_PD)
        return self.shape_logits(raw_PV[:rows].float())

    def shape_logits(self, raw_NV: Tensor) -> Tensor:
        """Apply the architecture's scale and soft-cap to float32 outputs of the unembedding."""
        scaled_NV = raw_NV if self.logit_scale == 1.0 else raw_NV * self.logit_scale
        return scaled_NV if not self.logit_cap else torch.tanh(scaled_NV / self.logit_cap) * self.logit_cap

    def _run_layer(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:  # Any: transformers' own
        """Run a layer of the generic front end; as a checkpoint if that is wanted and there will be a backward."""
        if not (self.checkpoint_activations and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        segments, plan, num_tokens = self.linears[0].segments, self.context.plan, self.context.num_tokens

        @contextmanager
        def again() -> Iterator[None]:
            # The backward comes after the call, when neither plan nor segments are in place any more.
            with self.context.using(plan, num_tokens), self._using(segments, self.linears[:-1]):
                yield

        return checkpoint(
            forward,
            *args,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: (nullcontext(), again()),
            **kwargs,
        )

    @contextmanager
    def _using(self, segments: Sequence[Segment], linears: Sequence[SegmentedLinear]) -> Iterator[None]:
        for linear in linears:
            linear.segments, linear.anchor = segments, self._anchor
        try:
            yield
        finally:
            for linear in linears:
                linear.segments, linear.anchor = (), None

    @torch.no_grad()
    def _check_head(self) -> None:
        """Compare our logits with the model's own, so that an unknown logit transform is refused, not ignored."""
        tokens_T = torch.arange(ROW_MULTIPLE, device=self.device) % self.info.vocab_size
        positions_T = torch.arange(ROW_MULTIPLE, device=self.device)
        plan = PackedCausal([ROW_MULTIPLE], self.device)
        ours_TV = self.logits(self.hidden(tokens_T, positions_T, plan, ()), ())
        with self.context.using(plan, ROW_MULTIPLE):
            theirs = self.model(input_ids=tokens_T[None], position_ids=positions_T[None], use_cache=False)
        if not torch.allclose(ours_TV, theirs.logits[0].float(), rtol=0.02, atol=0.02):
            raise EngineError("UNKNOWN_BASE", "the architecture shapes its logits in a way that is not supported")


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Return the element type of a name; `auto` is bfloat16 where the device has products of it."""
    if dtype == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
        features = torch.cpu.get_capabilities()
        native = features.get("avx512_bf16") or features.get("amx_bf16") or features.get("bf16")
        return torch.bfloat16 if native else torch.float32
    named = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype not in named:
        raise EngineError("BAD_VALUE", f"dtype must be auto, float32 or bfloat16, got {dtype!r}")
    return named[dtype]


def _pack_linears(model: PreTrainedModel, kind: Quantization, device: torch.device) -> None:
    """Pack every linear of the decoder layers; embeddings, norms and the unembedding keep their precision."""
    scratch = Scratch()
    for name, linear in find_linears(model)[:-1]:
        model.set_submodule(name, pack(linear, kind, device, scratch))


def find_sites(found: Sequence[tuple[str, nn.Linear]]) -> tuple[LoraSite, ...]:
    """Return the sites of a base's linears, given by name, the unembedding last."""
    sites: list[LoraSite] = []
    for index, (name, linear) in enumerate(found):
        kind: SiteKind = (
            "unembed" if index == len(found) - 1 else "attn" if "attn" in name or "attention" in name else "mlp"
        )
        previous = sites[-1] if sites else None
        group = previous.group if previous is not None and _share_input(previous.module_name, name) else index
        sites.append(LoraSite(index, name, linear.in_features, linear.out_features, kind, group))
    return tuple(sites)


def _replace_linears(model: PreTrainedModel, shard: Shard | None) -> tuple[list[SegmentedLinear], tuple[LoraSite, ...]]:
    """Swap every linear of the decoder layers, then the unembedding; return them with their sites, in order."""
    found = find_linears(model)
    sites = find_sites(found)
    linears = [SegmentedLinear(linear, site.index, shard) for site, (_, linear) in zip(sites, found, strict=True)]
    for site, linear in zip(sites, linears, strict=True):
        model.set_submodule(site.module_name, linear)
    return linears, sites


def _share_input(previous: str, name: str) -> bool:
    """Tell whether two linears are siblings that read the same input in every architecture that names them so."""
    (parent, _, first), (other, _, second) = previous.rpartition("."), name.rpartition(".")
    return parent == other and any(first in names and second in names for names in _SHARED_INPUT)


def _refuse_unstable(model: PreTrainedModel) -> None:
    rope: dict[str, Any] = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind in _UNSTABLE_ROPE:
        raise EngineError("UNKNOWN_BASE", f"rotary scaling {kind!r} depends on the longest sequence of a pass")


def describe(model: PreTrainedModel, path: str, name: str, kind: Quantization, num_parameters: int) -> BaseInfo:
    """Return what does not change about a base."""
    config = model.config.get_text_config()
    generation: GenerationConfig | None = model.generation_config
    eos = generation.eos_token_id if generation is not None else None
    eos = config.eos_token_id if eos is None else eos
    heads = int(config.num_attention_heads)
    return BaseInfo(
        name=served_name(name, kind),
        plain_name=name,
        path=path,
        vocab_size=int(config.vocab_size),
        max_context=int(config.max_position_embeddings),
        hidden_size=int(config.hidden_size),
        num_layers=int(config.num_hidden_layers),
        num_heads=heads,
        num_kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
        dtype=str(model.dtype).removeprefix("torch."),
        num_parameters=num_parameters,
        eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (int(eos),),
    )
