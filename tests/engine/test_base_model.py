"""Bases: which load, what their sites are, and that a packed stream is as good as separate sequences."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MistralConfig

from tests.engine.conftest import CONFIGS, SMALL
from treadle_engine.attention import PackedCausal
from treadle_engine.base_model import BaseModel
from treadle_engine.errors import EngineError
from treadle_engine.lora import AdapterWeights, LoraConfig, Segment

LENGTHS = [20, 1, 33]


@pytest.mark.parametrize("name", list(CONFIGS))
def test_a_packed_stream_gives_the_logits_of_separate_sequences(
    random_folder: Callable[[str], Path], name: str
) -> None:
    """Every architecture, unpatched in transformers, agrees with its own padded forward."""
    folder = random_folder(name)
    base = BaseModel.load(str(folder), dtype="float32")
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.randint(0, 300, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    with torch.no_grad():
        packed = base.logits(base.hidden(tokens, positions, PackedCausal(LENGTHS), ()), ())
        alone = torch.cat([reference(part[None]).logits[0] for part in tokens.split(LENGTHS)])
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=2e-4)


def test_sliding_windows_are_kept(tmp_path: Path) -> None:
    """A model with a window of 8 agrees with transformers beyond the window."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(MistralConfig(**SMALL, sliding_window=8)).save_pretrained(tmp_path)
    base = BaseModel.load(str(tmp_path), dtype="float32")
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = torch.arange(40)
    with torch.no_grad():
        ours = base.logits(base.hidden(tokens, torch.arange(40), PackedCausal([40]), ()), ())
        theirs = reference(tokens[None]).logits[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_sites_are_every_linear_in_order(pip: BaseModel) -> None:
    """Seven linears per layer and the unembedding, with global indices that a configuration only filters."""
    every = pip.lora_sites(LoraConfig())
    assert [site.index for site in every] == list(range(29))
    assert [site.kind for site in every[:7]] == ["attn"] * 4 + ["mlp"] * 3
    assert (every[-1].module_name, every[-1].kind) == ("lm_head", "unembed")
    only = pip.lora_sites(LoraConfig(train_mlp=False, train_unembed=False))
    assert only == tuple(site for site in every if site.kind == "attn")


def test_a_seed_fixes_the_initial_weights(pip: BaseModel) -> None:
    """Same seed, same digest; another seed, another; B is zero, so logits are the base's own bits."""
    weights = [AdapterWeights.init(pip, LoraConfig(rank=8, seed=seed)) for seed in (1, 1, 2)]
    assert weights[0].digest() == weights[1].digest() != weights[2].digest()
    tokens, positions = torch.arange(20), torch.arange(20)
    with torch.no_grad():
        logits = [
            pip.logits(pip.hidden(tokens, positions, PackedCausal([20]), segments), segments)
            for segments in ([Segment(0, 20, weights[0])], [])
        ]
    assert torch.equal(*logits)


@pytest.mark.parametrize("field", [{"rank": 0}, {"rank": 513}, {"alpha": 0.0}, {"seed": -1}])
def test_impossible_configurations_are_refused(field: dict[str, int]) -> None:
    """LoRA configurations are checked when they are made."""
    with pytest.raises(EngineError) as caught:
        LoraConfig(**field)
    assert caught.value.reason == "BAD_LORA_CONFIG"
    with pytest.raises(EngineError):
        LoraConfig(train_attn=False, train_mlp=False, train_unembed=False)


def test_bases_that_would_compute_something_else_are_refused(tmp_path: Path) -> None:
    """No base there, attention soft-caps, and rotary angles that depend on the neighbours."""
    dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    configs = {
        "gemma2": Gemma2Config(**SMALL, head_dim=16),
        "rope": LlamaConfig(**SMALL, rope_parameters=dynamic),
    }
    for name, config in configs.items():
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / name)
    for name in (*configs, "absent"):
        with pytest.raises(EngineError) as caught:
            BaseModel.load(str(tmp_path / name), dtype="float32")
        assert caught.value.reason == "UNKNOWN_BASE"


def test_weights_are_mapped_from_the_file_when_the_dtype_is_the_files(pip_folder: Path) -> None:
    """A process that serves the file's own dtype maps the file, so that processes share it."""
    program = """if True:
        import sys
        import torch
        from treadle_engine.base_model import BaseModel
        torch.set_num_threads(1)
        for dtype in ("float32", "bfloat16"):
            base = BaseModel.load(sys.argv[1], dtype=dtype)
            print(sum("model.safetensors" in line for line in open("/proc/self/maps")))
    """
    ran = subprocess.run([sys.executable, "-c", program, str(pip_folder)], check=True, capture_output=True)
    converted, mapped = (int(line) for line in ran.stdout.split())
    assert converted == 0
    assert mapped > 0
