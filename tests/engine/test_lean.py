"""The written-out decoder computes what transformers' modules compute, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.engine.builders import make_batch, make_state
from treadle_engine.base_model import BaseModel
from treadle_engine.losses import LossSpec
from treadle_engine.passes import Chunk, TrainingEngine

# Log-probs (absolute) and gradients (relative to their norm): rounding of the dtype, no more.
TOLERANCE = {"float32": (2e-4, 1e-4), "bfloat16": (0.1, 0.02)}


def outcome(base: BaseModel) -> tuple[np.ndarray, torch.Tensor]:
    """Return the log-probs and the gradient of a pass over two runs."""
    states = [make_state(base, 4), make_state(base, 3, seed=5)]
    chunks = [
        Chunk(state, make_batch(lengths, seed, base.info.vocab_size), LossSpec("cross_entropy"))
        for seed, (state, lengths) in enumerate(zip(states, ([20, 1, 33], [7]), strict=True))
    ]
    results = TrainingEngine(base).run_pass(chunks)
    return np.concatenate([one.logprobs_TK for one in results]), torch.cat([state.grads for state in states])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["pip", "llama", "llama_tied", "qwen2", "qwen3"])
def test_the_lean_decoder_equals_the_generic_one(
    random_folder: Callable[[str], Path], pip_folder: Path, name: str, dtype: str
) -> None:
    """Same log-probs and same gradients as through transformers' own forward and autograd."""
    base = BaseModel.load(str(pip_folder if name == "pip" else random_folder(name)), dtype=dtype)
    assert base.lean is not None
    logprobs, gradient = outcome(base)
    base.lean = None
    expected_logprobs, expected_gradient = outcome(base)
    near, share = TOLERANCE[dtype]
    assert np.abs(logprobs - expected_logprobs).max() < near
    assert float((gradient - expected_gradient).norm() / expected_gradient.norm()) < share


def test_other_architectures_take_the_generic_forward(random_folder: Callable[[str], Path]) -> None:
    """Gemma scales its embeddings and shifts its norms: it must not be mistaken for a Llama."""
    assert BaseModel.load(str(random_folder("gemma")), dtype="float32").lean is None
