"""Real small bases for the engine's tests: Pip, and random models of several architectures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from treadle_engine.base_model import BaseModel

SMALL = {
    "vocab_size": 307,
    "hidden_size": 48,
    "intermediate_size": 100,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SMALL, tie_word_embeddings=False),
    "llama_tied": lambda: LlamaConfig(**SMALL, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**SMALL, tie_word_embeddings=False),
    "qwen3": lambda: Qwen3Config(**SMALL, head_dim=16, tie_word_embeddings=True),
    "gemma": lambda: GemmaConfig(**SMALL, head_dim=16),
    # SmolLM and SmolLM2 are Llama; the third turns no positions in every other layer here.
    "smollm3": lambda: SmolLM3Config(**SMALL, no_rope_layer_interval=2),
}


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Small models on shared cores: a second thread would mostly wait for the first."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def pip_folder() -> Path:
    """Folder of the tiny base that ships with the package."""
    return Path(str(files("treadle_engine") / "data" / "pip"))


@pytest.fixture(scope="session")
def pip(pip_folder: Path) -> BaseModel:
    """Pip in float32."""
    return BaseModel.load(str(pip_folder), name="treadle/pip", dtype="float32")


@pytest.fixture(scope="session")
def random_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Make a folder with a random model of the named architecture."""

    def make(name: str) -> Path:
        folder = tmp_path_factory.getbasetemp() / f"random-{name}"
        if not folder.exists():
            torch.manual_seed(7)
            model = AutoModelForCausalLM.from_config(CONFIGS[name]())
            # The default initialisation is so small that a wrong layer would hardly show.
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.2) if parameter.ndim > 1 else None
            model.save_pretrained(folder)
        return folder

    return make
