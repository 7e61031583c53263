"""Two ranks of a base compute what one computes: the forward to the bit, gradients to the rounding of a sum."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig

from tests.engine.conftest import SMALL
from tests.ranks.program import CASES, STEPS, main
from tests.support.cluster import free_port

ROOT = Path(__file__).parents[2]
# Three heads and one for keys and values: no number of ranks divides them. Gemma scales what its embedding finds.
BASES = {
    "llama3heads": LlamaConfig(
        **{**SMALL, "num_attention_heads": 3, "num_key_value_heads": 1, "vocab_size": 301}, tie_word_embeddings=False
    ),
    "gemma": GemmaConfig(**SMALL, head_dim=16),
}
# Of the norm of all: rounding of float32, of bfloat16.
TOLERANCE = {"pip-bf16": 0.05}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, dict[str, Any]]]:
    """What one process, and each of two ranks, found; by `SIZE-RANK`, then by case."""
    folder = tmp_path_factory.mktemp("ranks")
    for name, config in BASES.items():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / "bases" / name)
    command = [str(Path(sys.executable).with_name("torchrun")), "--nproc-per-node=2", f"--master-port={free_port()}"]
    ranks = subprocess.Popen([*command, "--module", "tests.ranks.program", str(folder)], cwd=ROOT)
    try:
        threads = torch.get_num_threads()
        main(folder)
        torch.set_num_threads(threads)
        assert ranks.wait(timeout=300) == 0
    finally:
        ranks.kill()
    return {name: torch.load(folder / f"{name}.pt") for name in ("1-0", "2-0", "2-1")}


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Returns the norm of the difference over that of what should be."""
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.timeout(400)
@pytest.mark.parametrize("case", [*CASES, *BASES])
def test_two_ranks_are_one(found: dict[str, dict[str, dict[str, Any]]], case: str) -> None:
    """Log-probs before the first step have the same bits; the rest stays as near as rounding allows."""
    one, first, second = (found[name][case] for name in ("1-0", "2-0", "2-1"))
    tolerance = TOLERANCE.get(case, 2e-5)
    for number in (0, 1):
        assert torch.equal(first[f"logprobs 0 {number}"], one[f"logprobs 0 {number}"])
        for step in range(STEPS):
            for what in ("logprobs", "gradient", "weights"):
                key = f"{what} {step} {number}"
                assert torch.equal(first[key], second[key]), "replicas differ"
                assert distance(first[key], one[key]) < tolerance, key
    assert one["num_parameters"] == first["num_parameters"] == second["num_parameters"]
    # Norms are on every rank, and a small base's last columns are filled up.
    assert first["num_bytes"] < (0.6 if case in CASES else 0.8) * one["num_bytes"]


@pytest.mark.parametrize("case", [*CASES, *BASES])
def test_two_ranks_draw_what_one_draws(found: dict[str, dict[str, dict[str, Any]]], case: str) -> None:
    """The forward has one rank's bits, and so have samples and the log-probs of prompts."""
    one, first, second = (found[name][case] for name in ("1-0", "2-0", "2-1"))
    assert first["tokens"] == second["tokens"] == one["tokens"]
    for what in ("sampled", "prompt"):
        assert torch.equal(first[what], second[what])
        assert distance(first[what], one[what]) < TOLERANCE.get(case, 2e-5)
