"""Fixtures of the sampler's tests: Pip in float32 on one thread, adapters with visible effects, and a small driver."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
import torch

from treadle_engine import tiles
from treadle_engine.bases import PIP_NAME, pip_folder
from treadle_engine.decode import Decoder
from treadle_engine.decode_base import DecodeBase
from treadle_engine.lora import AdapterWeights, LoraConfig
from treadle_engine.stops import Detokenize, load_detokenizer


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Leave the other cores to others."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def base() -> DecodeBase:
    """Pip, ready to decode, as a sampler loads it."""
    base = DecodeBase.load(str(pip_folder()), name=PIP_NAME, dtype="float32")
    base.prepack()
    return base


@pytest.fixture(scope="session")
def detokenize() -> Detokenize:
    """Pip's tokenizer, from tokens to text."""
    return load_detokenizer(str(pip_folder()))


@pytest.fixture(scope="session")
def adapters(base: DecodeBase) -> list[AdapterWeights]:
    """Adapters of several ranks and site sets whose effect is far above rounding."""
    configs = [
        LoraConfig(rank=8, alpha=16, seed=1),
        LoraConfig(rank=3, alpha=6, seed=2),
        LoraConfig(rank=16, alpha=32, seed=3, train_mlp=False),
        LoraConfig(rank=4, alpha=8, seed=4, train_unembed=False),
    ]
    made = []
    for config in configs:
        weights = AdapterWeights.init(base, config)
        noise = torch.randn(weights.flat.shape, generator=torch.Generator().manual_seed(config.seed))
        weights.flat.add_(noise, alpha=0.1)
        weights.refresh()
        made.append(weights)
    return made


@pytest.fixture
def decoder(base: DecodeBase, detokenize: Detokenize) -> Decoder:
    """An idle decoder."""
    return Decoder(base, detokenize)


def make_prompt(length: int, seed: int = 0) -> npt.NDArray[np.int32]:
    """Return random ordinary tokens of Pip."""
    return np.random.default_rng([seed, length]).integers(3, 1024, size=length, dtype=np.int32)


def take_kernels_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Go on as on a machine without the instructions that tiles are made of."""
    for name in ("multiplies_halves", "multiplies_floats"):
        monkeypatch.setattr(tiles, name, lambda: False)
