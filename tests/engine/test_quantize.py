"""A base in 8 or 4 bits: what is packed, how far it is from the original, and that adapters train over it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from bitsandbytes import functional
from torch import Tensor, nn

from tests.engine.builders import make_batch, make_state
from tests.engine.test_golden_peft import peft_copy, reference_loss
from tests.sampler.driving import run as decode
from treadle_engine.base_model import BaseModel
from treadle_engine.batch import TokenBatch
from treadle_engine.decode import Decoder
from treadle_engine.decode_base import DecodeBase
from treadle_engine.decode_requests import SampleRequest
from treadle_engine.errors import EngineError
from treadle_engine.lora import SegmentedLinear
from treadle_engine.losses import LossSpec
from treadle_engine.optim import AdamParams, optim_step
from treadle_engine.passes import Chunk, TrainingEngine
from treadle_engine.peft_format import load_adapter, save_adapter
from treadle_engine.quantize import Quantization, Scratch, pack
from treadle_engine.sampling_params import SamplingParams

CPU = torch.device("cpu")
KINDS: list[Quantization] = ["int8", "nf4"]

# PEFT warns of a tied unembedding in the adapter, and uses a name that transformers retires.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]


def unpacked(weight_OI: Tensor, kind: Quantization) -> Tensor:
    """Return what is left of a weight after packing."""
    linear = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], dtype=weight_OI.dtype)
    linear.weight.data = weight_OI
    return SegmentedLinear(pack(linear, kind, CPU, Scratch()), 0).frozen_weight().clone()


@pytest.mark.parametrize("shape", [(64, 128), (100, 48), (48, 100), (33, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_rounds_each_row_to_its_own_scale(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Values are round(127 w / absmax) * absmax / 127, row by row."""
    weight_OI = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    scale_O1 = weight_OI.float().abs().amax(dim=1, keepdim=True) / 127
    expected = (weight_OI.float() / scale_O1).round() * scale_O1
    found = unpacked(weight_OI, "int8")
    assert found.dtype == dtype
    # Where a value lies between two levels, the library may take either: its own division rounds differently.
    tie = scale_O1 * 0.51 if dtype == torch.float32 else scale_O1 * 0.51 + weight_OI.float().abs() * 2**-8
    assert ((found.float() - weight_OI.float()).abs() <= tie).all()
    assert (found.float() - expected).norm() / expected.norm() < (1e-3 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("shape", [(64, 128), (100, 48), (48, 100), (33, 7)])
def test_nf4_takes_the_nearest_level_of_each_block(shape: tuple[int, int]) -> None:
    """Each value is the nearest of the 16 levels times the largest magnitude of its block of 64."""
    weight_OI = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    levels = functional.get_4bit_type("nf4", device="cpu")
    flat = torch.nn.functional.pad(weight_OI.reshape(-1), (0, -weight_OI.numel() % 64)).view(-1, 64)
    absmax = flat.abs().amax(dim=1, keepdim=True)
    nearest = (flat[..., None] / absmax[..., None] - levels).abs().argmin(dim=-1)
    expected = (levels[nearest] * absmax).view(-1)[: weight_OI.numel()].view(shape)
    found = unpacked(weight_OI, "nf4")
    assert (found - expected).norm() / expected.norm() < 1e-3
    assert 0.05 < float((found - weight_OI).norm() / weight_OI.norm()) < 0.12


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_decoders_linears_are_packed(random_folder: Callable[[str], Path], kind: Quantization) -> None:
    """Embeddings, norms and the unembedding keep their bits, and no full copy of a packed weight is left."""
    folder = str(random_folder("llama"))
    full, packed = (BaseModel.load(folder, dtype="float32", quantize=q) for q in ("none", kind))
    kept = dict(packed.model.named_parameters())
    assert set(kept) == {name for name in dict(full.model.named_parameters()) if not name.endswith("proj.weight")}
    for name, parameter in kept.items():
        assert torch.equal(parameter, dict(full.model.named_parameters())[name])
    linears = sum(4 * linear.weight.numel() for linear in full.linears[:-1])
    share = (packed.num_bytes - (full.num_bytes - linears)) / linears
    assert share < (0.28 if kind == "int8" else 0.15)
    assert packed.info.num_parameters == full.info.num_parameters


def test_a_quantized_base_has_a_name_of_its_own(pip_folder: Path, tmp_path: Path) -> None:
    """Runs are matched by the base's name: another precision must be another base. Exports name the weights."""
    base = BaseModel.load(str(pip_folder), name="treadle/pip", dtype="float32", quantize="nf4")
    assert base.info.name == "treadle/pip@nf4"
    save_adapter(tmp_path, base, make_state(base).weights)
    assert '"base_model_name_or_path": "treadle/pip"' in (tmp_path / "adapter_config.json").read_text()
    assert load_adapter(tmp_path, base).digest() == make_state(base).weights.digest()


def test_an_unknown_quantization_is_refused(pip_folder: Path) -> None:
    """The error names the choices."""
    with pytest.raises(EngineError, match="none, int8, nf4"):
        BaseModel.load(str(pip_folder), quantize="int4")


@pytest.mark.parametrize("lean", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_pefts_over_the_unpacked_weights(
    pip_folder: Path, tmp_path: Path, kind: Quantization, lean: bool
) -> None:
    """Loss and every gradient agree with plain PEFT on a base that holds the unpacked weights in float32."""
    base = BaseModel.load(str(pip_folder), dtype="float32", quantize=kind)
    base.lean = base.lean if lean else None
    state = make_state(base, rank=8)
    batch = make_batch([40, 25, 7], 3, base.info.vocab_size)
    model = peft_copy(pip_folder, base, state, tmp_path)
    for site, linear in zip(base.sites[:-1], base.linears[:-1], strict=True):
        model.get_submodule(
            f"base_model.model.{site.module_name}.base_layer"
        ).weight.data = linear.frozen_weight().clone()
    loss = reference_loss(model, batch, "cross_entropy")
    loss.backward()
    (result,) = TrainingEngine(base).run_pass([Chunk(state, batch, LossSpec("cross_entropy"))])
    assert abs(result.loss_sum - float(loss.detach())) < 1e-3
    ours = state.weights.layout.pairs(state.grads)
    theirs = dict(model.named_parameters())
    for site in base.sites:
        for letter, gradient in zip("AB", ours[site.index] or (), strict=True):
            expected = theirs[f"base_model.model.{site.module_name}.lora_{letter}.default.weight"].grad
            assert expected is not None
            assert (gradient - expected).norm() <= 1e-4 * expected.norm(), site.module_name


def text(vocab: int) -> TokenBatch:
    """Return sequences that repeat a phrase each, so that they can be learned."""
    rng = np.random.default_rng(5)
    rows = [np.resize(rng.integers(3, vocab, 5), 25).astype(np.int32) for _ in range(3)]
    tokens, targets = (np.concatenate([row[cut] for row in rows]) for cut in (slice(None, -1), slice(1, None)))
    weights = np.ones(len(tokens), dtype=np.float32)
    return TokenBatch(np.array([24] * 3, dtype=np.int64), tokens, targets, {"weights": weights})


@pytest.mark.parametrize(("kind", "near"), [("int8", 0.01), ("nf4", 0.25)])
def test_a_task_is_learned_over_a_quantized_base(
    pip_folder: Path, pip: BaseModel, kind: Quantization, near: float
) -> None:
    """It starts near the full base's loss per token and ends as low."""
    losses: dict[str, list[float]] = {}
    for name, base in (("none", pip), (kind, BaseModel.load(str(pip_folder), dtype="float32", quantize=kind))):
        state, batch = make_state(base, rank=8), text(base.info.vocab_size)
        losses[name] = []
        for _ in range(25):
            (result,) = TrainingEngine(base).run_pass([Chunk(state, batch, LossSpec("cross_entropy"))])
            losses[name].append(result.loss_sum / batch.num_tokens)
            optim_step(state, AdamParams(learning_rate=1e-2))
    assert abs(losses[kind][0] - losses["none"][0]) < near
    assert losses[kind][0] > 3.0
    assert losses[kind][-1] < 0.1 * losses[kind][0]


@pytest.mark.parametrize("kind", KINDS)
def test_sampler_and_trainer_agree_on_a_quantized_base(pip_folder: Path, kind: Quantization) -> None:
    """Log-probs of sampled tokens are those of the trainer over the same packed weights, to rounding."""
    base = BaseModel.load(str(pip_folder), dtype="float32", quantize=kind)
    decode_base = DecodeBase.load(str(pip_folder), dtype="float32", quantize=kind)
    state = make_state(base, rank=8)
    prompt = np.arange(3, 23, dtype=np.int32)
    params = SamplingParams(max_tokens=20, seed=1, ignore_eos=True)
    (outcome,) = decode(Decoder(decode_base), [SampleRequest(prompt, params, make_state(decode_base, rank=8).weights)])
    tokens = np.concatenate([prompt, np.array(outcome.tokens[0], dtype=np.int32)])
    targets = tokens[1:].copy()
    targets[: len(prompt) - 1] = -1
    batch = TokenBatch(
        np.array([len(targets)], dtype=np.int64), tokens[:-1], targets, {"weights": np.ones(len(targets), np.float32)}
    )
    (result,) = TrainingEngine(base).run_pass([Chunk(state, batch, LossSpec("cross_entropy"), forward_only=True)])
    assert np.allclose(result.logprobs_TK[len(prompt) - 1 :], outcome.logprobs[0], atol=1e-4)
