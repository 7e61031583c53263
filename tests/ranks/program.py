"""What each rank of a test runs: trains and samples on several bases, and leaves what came of it as a file.

Run by torchrun, or as it is for one rank: `python -m tests.ranks.program FOLDER`. Bases are those in FOLDER/bases.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.engine.builders import make_batch, make_state
from tests.sampler.driving import run
from treadle_engine.base_model import BaseModel
from treadle_engine.bases import pip_folder
from treadle_engine.decode import Decoder
from treadle_engine.decode_base import DecodeBase
from treadle_engine.decode_requests import SampleRequest
from treadle_engine.determinism import settle
from treadle_engine.losses import LossSpec
from treadle_engine.optim import AdamParams, TrainState, optim_step
from treadle_engine.passes import Chunk, TrainingEngine
from treadle_engine.rank_group import Launch, RankGroup
from treadle_engine.sampling_params import SamplingParams
from treadle_engine.shards import Shard

STEPS = 10
CASES = {"pip": ("float32", "none"), "pip-bf16": ("bfloat16", "none"), "pip-nf4": ("float32", "nf4")}


def folder_of(case: str, bases: Path) -> str:
    """Returns where a case's base is."""
    return str(pip_folder() if case in CASES else bases / case)


def train(base: BaseModel, *, checkpoint: bool) -> dict[str, Any]:
    """Makes ten steps of two runs that share passes; returns log-probs, gradients and weights of each."""
    base.checkpoint_activations = checkpoint
    engine = TrainingEngine(base)
    states: list[TrainState] = [make_state(base, rank=8, seed=1), make_state(base, rank=3, seed=2, train_mlp=False)]
    found: dict[str, Any] = {"num_bytes": base.num_bytes, "num_parameters": base.info.num_parameters}
    for step in range(STEPS):
        chunks = [
            Chunk(states[0], make_batch([60, 17, 90], step, base.info.vocab_size), LossSpec("cross_entropy")),
            Chunk(states[1], make_batch([33, 40], step + 100, base.info.vocab_size, "ppo"), LossSpec("ppo")),
        ]
        results = engine.run_pass(chunks)
        assert all(result.error is None for result in results)
        for number, (state, result) in enumerate(zip(states, results, strict=True)):
            found[f"logprobs {step} {number}"] = torch.from_numpy(result.logprobs_TK.copy())
            found[f"gradient {step} {number}"] = state.grads.clone()
            optim_step(state, AdamParams(learning_rate=1e-3))
            found[f"weights {step} {number}"] = state.weights.flat.clone()
    return found


def sample(base: DecodeBase) -> dict[str, Any]:
    """Draws from the base and from two adapters at once; returns tokens and log-probs."""
    base.prepack()
    weights = [None, make_state(base, rank=8, seed=1).weights, make_state(base, rank=3, seed=2).weights]
    prompt_T = np.random.default_rng(0).integers(3, base.info.vocab_size, 21, dtype=np.int32)
    requests = [
        SampleRequest(
            prompt_T, SamplingParams(max_tokens=12, seed=seed, ignore_eos=True), adapter, 2, prompt_logprobs=True
        )
        for seed, adapter in enumerate(weights)
    ]
    outcomes = run(Decoder(base), requests, joins=[0, 2, 5])
    return {
        "tokens": [outcome.tokens for outcome in outcomes],
        "sampled": torch.tensor([outcome.logprobs[index] for outcome in outcomes for index in (0, 1)]),
        "prompt": torch.stack([torch.from_numpy(outcome.prompt_logprobs_T[1:]) for outcome in outcomes]),
    }


def main(folder: Path) -> None:
    """Runs all cases on this rank."""
    settle(1)
    shard: Shard | None = None
    rank = 0
    if not Launch().is_alone:
        group = RankGroup("cpu", 120.0)
        shard, rank = group.shard, group.rank
    found: dict[str, Any] = {}
    for case in (*CASES, *sorted(path.name for path in (folder / "bases").iterdir())):
        dtype, quantize = CASES.get(case, ("float32", "none"))
        place = folder_of(case, folder / "bases")
        base = BaseModel.load(place, name=case, dtype=dtype, quantize=quantize, shard=shard)
        found[case] = train(base, checkpoint=case == "pip-nf4")
        found[case] |= sample(DecodeBase.load(place, name=case, dtype=dtype, quantize=quantize, shard=shard))
    torch.save(found, folder / f"{1 if shard is None else shard.size}-{rank}.pt")
    if shard is not None:
        RankGroup.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
