"""Adapters leave as PEFT folders and come back, or are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load, save
from transformers import AutoModelForCausalLM

from tests.engine.builders import make_state
from treadle_engine.attention import PackedCausal
from treadle_engine.base_model import BaseModel
from treadle_engine.errors import EngineError
from treadle_engine.lora import AdapterWeights, LoraConfig, Segment
from treadle_engine.peft_format import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    from_files,
    load_adapter,
    save_adapter,
    to_files,
    weights_parts,
)
from treadle_engine.tensor_files import write_parts

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]


@torch.no_grad()
def our_logits(base: BaseModel, weights: AdapterWeights, tokens: torch.Tensor) -> torch.Tensor:
    """Return the logits of one sequence under an adapter."""
    length = tokens.shape[0]
    segments = [Segment(0, length, weights)]
    hidden = base.hidden(tokens, torch.arange(length), PackedCausal([length]), segments)
    return base.logits(hidden, segments)


@pytest.mark.parametrize("name", ["llama", "llama_tied", "qwen3", "gemma"])
@pytest.mark.parametrize("kinds", [{}, {"train_unembed": False}, {"train_mlp": False}])
def test_exported_folders_give_the_same_logits_in_peft(
    random_folder: Callable[[str], Path], tmp_path: Path, name: str, kinds: dict[str, bool]
) -> None:
    """PEFT loads the folder onto tied and untied bases and computes our logits; so do we after reading it back."""
    folder = random_folder(name)
    base = BaseModel.load(str(folder), dtype="float32")
    weights = make_state(base, rank=6, **kinds).weights
    save_adapter(tmp_path, base, weights)
    tokens = torch.arange(3, 40)
    ours = our_logits(base, weights, tokens)
    model = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), str(tmp_path)
    )
    with torch.no_grad():
        theirs = model(tokens[None]).logits[0]
    # Random logits reach tens, so this is rounding.
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-4)
    again = load_adapter(tmp_path, base)
    assert again.config.covers("unembed") == kinds.get("train_unembed", True)
    assert torch.equal(our_logits(base, again, tokens), ours)
    assert torch.equal(again.flat, weights.flat)


def test_a_peft_adapter_on_some_modules_is_continued(pip: BaseModel, pip_folder: Path, tmp_path: Path) -> None:
    """An adapter that PEFT made for q and v alone, with rsLoRA scaling, gives PEFT's logits."""
    model = AutoModelForCausalLM.from_pretrained(pip_folder, dtype=torch.float32)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], use_rslora=True, task_type="CAUSAL_LM"
    )
    theirs = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    theirs.save_pretrained(tmp_path)
    weights = load_adapter(tmp_path, pip)
    assert (weights.config.train_attn, weights.config.train_mlp, weights.config.train_unembed) == (True, False, False)
    tokens = torch.arange(5, 30)
    with torch.no_grad():
        expected = theirs(tokens[None]).logits[0]
    torch.testing.assert_close(our_logits(pip, weights, tokens), expected, rtol=1e-4, atol=2e-4)


def changed_config(files: dict[str, bytes], **changes: object) -> dict[str, bytes]:
    """Return the files with other settings."""
    return {**files, CONFIG_FILE: json.dumps({**json.loads(files[CONFIG_FILE]), **changes}).encode()}


def changed_tensors(files: dict[str, bytes], change: Callable[[dict[str, torch.Tensor]], None]) -> dict[str, bytes]:
    """Return the files with other tensors."""
    tensors = load(files[WEIGHTS_FILE])
    change(tensors)
    return {**files, WEIGHTS_FILE: save(tensors)}


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda files: {CONFIG_FILE: files[CONFIG_FILE]}, "BAD_ADAPTER_FILE"),
        (lambda files: {**files, WEIGHTS_FILE: b"\x80\x04pickle"}, "BAD_ADAPTER_FILE"),
        (lambda files: {**files, WEIGHTS_FILE: files[WEIGHTS_FILE][:-100]}, "BAD_ADAPTER_FILE"),
        (lambda files: {**files, CONFIG_FILE: b"[" * 100000}, "BAD_ADAPTER_FILE"),
        (lambda files: {**files, CONFIG_FILE: b"\xff\xfe"}, "BAD_ADAPTER_FILE"),
        (lambda files: changed_config(files, r="4"), "BAD_ADAPTER_FILE"),
        (lambda files: changed_config(files, peft_type="IA3"), "BAD_ADAPTER_FILE"),
        (lambda files: changed_config(files, r=100000), "INCOMPATIBLE_ADAPTER"),
        (lambda files: changed_config(files, r=8), "INCOMPATIBLE_ADAPTER"),
        (lambda files: changed_config(files, use_dora=True), "INCOMPATIBLE_ADAPTER"),
        (lambda files: changed_tensors(files, lambda t: t[KEY].fill_(float("nan"))), "BAD_ADAPTER_FILE"),
        (lambda files: changed_tensors(files, lambda t: t.update(evil=torch.zeros(1))), "BAD_ADAPTER_FILE"),
        (
            lambda files: changed_tensors(files, lambda t: t.update({KEY.replace(".0.", ".99."): t[KEY] + 0})),
            "INCOMPATIBLE_ADAPTER",
        ),
    ],
)
def test_bad_files_are_refused(
    pip: BaseModel, spoil: Callable[[dict[str, bytes]], dict[str, bytes]], reason: str
) -> None:
    """Nothing malformed or foreign is read as an adapter."""
    files = spoil(to_files(pip, make_state(pip, rank=4).weights))
    with pytest.raises(EngineError) as caught:
        from_files(pip, files)
    assert caught.value.reason == reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_files_are_those_of_safetensors(pip: BaseModel, tmp_path: Path, dtype: torch.dtype) -> None:
    """Byte for byte what the library writes, in memory and on disk; a mapped file gives the same weights."""
    weights = AdapterWeights.init(pip, LoraConfig(rank=5, seed=3, train_mlp=False))
    named = {f"base_model.model.{name}": value.to(dtype).contiguous() for name, value in weights.to_tensors().items()}
    files = to_files(pip, weights, dtype)
    assert files[WEIGHTS_FILE] == save(named, {"format": "pt"})
    path = tmp_path / "weights"
    for length in (None, 10, 2 * len(files[WEIGHTS_FILE])):
        if length is not None:
            path.write_bytes(b"?" * length)
        write_parts(path, weights_parts(weights, dtype))
        assert path.read_bytes() == files[WEIGHTS_FILE]
    assert weights_parts(weights, dtype).num_bytes == len(files[WEIGHTS_FILE])
    mapped = from_files(pip, {CONFIG_FILE: files[CONFIG_FILE], WEIGHTS_FILE: path})
    assert torch.equal(mapped.flat, from_files(pip, files).flat)
