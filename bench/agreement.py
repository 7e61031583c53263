"""`python -m bench agreement`: log-probs of drawn tokens as the sampler drew them and as the trainer computes them.

Tokens are drawn from an adapter; the trainer's forward over the same texts gives log-probs p, the sampler gave q. The
difference, and the estimators k1 = E[log q - log p] and k3 = E[p/q - 1 - log(p/q)] of KL(q || p) that papers on
reinforcement learning report, say how far off-policy a loop is that did not mean to be.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bench.sampling import Row, make_adapters
from treadle_engine.base_model import BaseModel
from treadle_engine.bases import resolve
from treadle_engine.batch import TokenBatch
from treadle_engine.decode import Decoder
from treadle_engine.decode_base import DecodeBase
from treadle_engine.decode_requests import SampleRequest, TokenEvent
from treadle_engine.determinism import settle
from treadle_engine.losses import LossSpec
from treadle_engine.optim import TrainState
from treadle_engine.passes import Chunk, TrainingEngine
from treadle_engine.sampling_params import SamplingParams

_EDGES = (0.0, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, np.inf)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds what may be chosen."""
    parser.add_argument("--base", choices=("smollm2", "pip"), default="smollm2")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=("float32", "bfloat16"))
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)


def run(options: argparse.Namespace) -> list[Row]:
    """Measures in each dtype."""
    settle(1)
    folder, _ = resolve(options.base, Path.home() / ".cache/treadle", "float32")
    rows: list[Row] = []
    for dtype in options.dtypes:
        drawn, trained = both(folder, dtype, options.samples, options.tokens)
        difference = drawn - trained
        shares = np.histogram(np.abs(difference), bins=_EDGES)[0] / difference.size
        k1, k3 = estimators(drawn, trained)
        facts = {
            "greatest |difference|": f"{np.abs(difference).max():.1e}",
            "mean |difference|": f"{np.abs(difference).mean():.1e}",
            "k1": f"{k1:.1e}",
            "k3": f"{k3:.1e}",
            "share of tokens by |difference|": "; ".join(
                f"<{edge:.0e}: {share:.0%}" for edge, share in zip(_EDGES[1:], shares, strict=True) if share
            ),
        }
        rows += [{"figure": f"{dtype}, {drawn.size} tokens: {name}", "value": value} for name, value in facts.items()]
    return rows


def estimators(drawn: npt.NDArray[np.float64], trained: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Returns k1 and k3 of KL(sampler || trainer) from log-probs of tokens that the sampler drew."""
    log_ratio = trained - drawn
    return float(-log_ratio.mean()), float((np.expm1(log_ratio) - log_ratio).mean())


def both(
    folder: str, dtype: str, num_samples: int, num_tokens: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Returns the sampler's and the trainer's log-probs of the same drawn tokens."""
    base = DecodeBase.load(folder, dtype=dtype)
    base.prepack()
    base.compile()
    (weights,) = make_adapters(base, 1)
    rng = np.random.default_rng(0)
    decoder = Decoder(base)
    prompts = {}
    for seed in range(num_samples):
        prompt_T = rng.integers(3, base.info.vocab_size, int(rng.integers(20, 100))).astype(np.int32)
        params = SamplingParams(max_tokens=num_tokens, seed=seed, ignore_eos=True)
        prompts[decoder.add(SampleRequest(prompt_T, params, weights))] = prompt_T
    tokens: dict[int, list[int]] = {number: [] for number in prompts}
    drawn: dict[int, list[float]] = {number: [] for number in prompts}
    while decoder.has_work:
        for event in decoder.step():
            if isinstance(event, TokenEvent):
                tokens[event.request].append(event.token)
                drawn[event.request].append(event.logprob)
    engine = TrainingEngine(BaseModel.load(folder, dtype=dtype))
    trained = []
    for number, prompt_T in prompts.items():
        text_T = np.array([*prompt_T, *tokens[number]], dtype=np.int32)
        batch = TokenBatch(
            lengths_R=np.array([len(text_T) - 1]), tokens_T=text_T[:-1], targets_TK=text_T[1:], columns={}
        )
        chunk = Chunk(TrainState.fresh(weights), batch, LossSpec("cross_entropy", {}), forward_only=True)
        (result,) = engine.run_pass([chunk])
        if result.error is not None:
            raise result.error
        trained.append(result.logprobs_TK.reshape(-1)[len(prompt_T) - 1 :])
    found = np.concatenate([np.array(drawn[number]) for number in prompts])
    return found.astype(np.float64), np.concatenate(trained).astype(np.float64)
