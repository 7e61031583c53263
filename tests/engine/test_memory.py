"""Checkpointed activations change no bit, and a chunk that does not fit into memory fails alone."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.engine.builders import make_batch, make_state
from tests.engine.conftest import SMALL
from treadle_engine.base_model import BaseModel
from treadle_engine.losses import LossSpec
from treadle_engine.memory import Gradients
from treadle_engine.passes import Chunk, TrainingEngine

# Run in a process of its own, whose address space is then limited: the long chunk must not have run there before,
# or its memory would still be in the allocator's hands.
STARVED = """
import ctypes, json, resource, sys
from pathlib import Path
import torch
from tests.engine.builders import make_batch, make_state
from treadle_engine.base_model import BaseModel
from treadle_engine.losses import LossSpec
from treadle_engine.passes import Chunk, TrainingEngine

torch.set_num_threads(1)
base = BaseModel.load(sys.argv[1], dtype="float32")
engine, spec, vocab = TrainingEngine(base), LossSpec("cross_entropy"), base.info.vocab_size

def pieces(states):
    begun, first, second = states
    return [Chunk(begun, make_batch([10], 2, vocab), spec), Chunk(first, make_batch([7, 3], 3, vocab), spec),
            Chunk(second, make_batch([9], 4, vocab), spec)]

def states():
    made = [make_state(base, 4), make_state(base, 3, seed=5), make_state(base, 2, seed=6)]
    engine.run_pass([Chunk(made[0], make_batch([12], 1, vocab), spec)])
    return made

expected = states()
alone = engine.run_pass(pieces(expected))
huge = make_state(base, 4, seed=7)
for headroom in range(16, 64, 8):
    found = states()
    chunks = pieces(found)
    chunks.insert(2, Chunk(huge, make_batch([900], 5, vocab), spec))
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + headroom * 2**20, resource.RLIM_INFINITY))
    results = engine.run_pass(chunks)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    failed = [result.error for result in results]
    if not any(failed[:2] + failed[3:]):
        break
others = [result for place, result in enumerate(results) if place != 2]
print(json.dumps({
    "headroom": headroom,
    "failed": [error and [error.reason, error.message] for error in failed],
    "same_losses": [one.loss_sum == two.loss_sum for one, two in zip(alone, others)],
    "same_gradients": [torch.equal(one.grads, two.grads) for one, two in zip(expected, found)],
    "dropped": not huge.grads.any().item() and not huge.has_gradient,
}))
"""


def test_only_what_does_not_fit_alone_fails(tmp_path: Path) -> None:
    """With too little address space the long chunk gets OUT_OF_MEMORY; its neighbours' losses and gradients keep
    their bits, also where a run had a gradient from before."""
    # Wide enough that 900 tokens take about 100 MB.
    config = LlamaConfig(**{**SMALL, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    command = [sys.executable, "-c", STARVED, str(tmp_path)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert [error and error[0] for error in seen["failed"]] == [None, None, "OUT_OF_MEMORY", None], seen
    assert "900 tokens in 1 sequences of at most 900" in seen["failed"][2][1]
    assert seen["same_losses"] == [True] * 3
    assert seen["same_gradients"] == [True] * 3
    assert seen["dropped"]


def outcome(base: BaseModel, checkpointed: bool) -> tuple[np.ndarray, list[torch.Tensor]]:
    """Return log-probs and gradients of a merged pass with long and short sequences, another pass in between."""
    base.checkpoint_activations = checkpointed
    states = [make_state(base, 4), make_state(base, 3, seed=5)]
    chunks = [
        Chunk(state, make_batch(lengths, seed, base.info.vocab_size), LossSpec("cross_entropy"))
        for seed, (state, lengths) in enumerate(zip(states, ([20, 1, 240], [7, 100]), strict=True))
    ]
    results = TrainingEngine(base).run_pass([*chunks, *chunks])
    base.checkpoint_activations = False
    return np.concatenate([one.logprobs_TK for one in results]), [state.grads for state in states]


@pytest.mark.parametrize("lean", [True, False])
@pytest.mark.parametrize("name", ["pip-float32-none", "pip-bfloat16-none", "qwen3-float32-nf4", "gemma-float32-int8"])
def test_checkpointed_activations_change_no_bit(
    random_folder: Callable[[str], Path], pip_folder: Path, name: str, lean: bool
) -> None:
    """Log-probs and gradients are bit for bit those without checkpoints, through either front end."""
    architecture, dtype, quantize = name.split("-")
    folder = pip_folder if architecture == "pip" else random_folder(architecture)
    base = BaseModel.load(str(folder), dtype=dtype, quantize=quantize)
    if lean and base.lean is None:
        pytest.skip("this architecture has no written-out decoder")
    base.lean = base.lean if lean else None
    logprobs, gradients = outcome(base, checkpointed=False)
    again_logprobs, again_gradients = outcome(base, checkpointed=True)
    assert np.array_equal(logprobs, again_logprobs)
    assert all(torch.equal(one, two) for one, two in zip(gradients, again_gradients, strict=True))
    assert all(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("lean", [True, False])
def test_checkpoints_keep_only_the_layers_inputs(pip: BaseModel, lean: bool) -> None:
    """Between forward and backward, far fewer bytes are alive."""
    decoder, pip.lean = pip.lean, pip.lean if lean else None
    held = {}
    for checkpointed in (False, True):
        pip.checkpoint_activations = checkpointed
        held[checkpointed] = bytes_held(pip)
    pip.lean, pip.checkpoint_activations = decoder, False
    assert held[True] < 0.3 * held[False]


def bytes_held(base: BaseModel) -> int:
    """Return how many bytes a forward with gradients leaves allocated, as the profiler counts them."""
    from torch.profiler import ProfilerActivity, profile

    from treadle_engine.attention import PackedCausal
    from treadle_engine.lora import Segment

    state = make_state(base)
    tokens = torch.arange(200) % base.info.vocab_size
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        x_TD = base.hidden(
            tokens, torch.arange(200), PackedCausal([200]), [Segment(0, 200, state.weights, state.grads)]
        )
    total = sum(event.self_cpu_memory_usage for event in profiler.events())
    assert x_TD.requires_grad
    return int(total)


def test_an_undone_attempt_leaves_no_trace(pip: BaseModel) -> None:
    """A run with a gradient and one without are put back to what they were, and the chunks can run again."""
    engine, spec = TrainingEngine(pip), LossSpec("cross_entropy")
    once, twice = ([make_state(pip, 4), make_state(pip, 3, seed=5)] for _ in range(2))
    for states in (once, twice):
        engine.run_pass([Chunk(states[0], make_batch([12], 1, 1024), spec)])
    attempt = Gradients(twice)
    for states in (twice, once, twice):
        engine.run_pass([Chunk(state, make_batch([9, 4], 2, 1024), spec) for state in states])
        if states is twice:
            kept = [state.grads.clone() for state in twice]
            attempt.undo()
    assert not twice[1].has_gradient
    assert all(torch.equal(one.grads, gradient) for one, gradient in zip(once, kept, strict=True))
