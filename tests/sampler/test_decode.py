"""The decoder against transformers and against the training pass: same tokens, same numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.sampler.conftest import make_prompt
from tests.sampler.driving import run
from treadle_engine.base_model import BaseModel, choose_dtype
from treadle_engine.bases import PIP_NAME, pip_folder
from treadle_engine.batch import TokenBatch
from treadle_engine.decode import PREFILL_ROWS, Decoder
from treadle_engine.decode_base import DecodeBase
from treadle_engine.decode_requests import SampleRequest
from treadle_engine.lora import AdapterWeights
from treadle_engine.losses import LossSpec
from treadle_engine.optim import TrainState
from treadle_engine.passes import Chunk, TrainingEngine
from treadle_engine.peft_format import save_adapter
from treadle_engine.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)


@pytest.fixture(scope="module")
def hub_model() -> PreTrainedModel:
    """Pip as transformers runs it."""
    return AutoModelForCausalLM.from_pretrained(pip_folder(), dtype=torch.float32)


def generate(model: torch.nn.Module, prompt_T: np.ndarray, count: int) -> list[int]:
    """Return transformers' greedy continuation."""
    tokens = torch.from_numpy(prompt_T.astype(np.int64))[None]
    output = model.generate(tokens, do_sample=False, max_new_tokens=count, eos_token_id=-1, pad_token_id=0)
    return output[0, len(prompt_T) :].tolist()


def test_greedy_equals_transformers(hub_model: PreTrainedModel, decoder: Decoder) -> None:
    """Prompts of very different lengths, decoded together, give what generate gives one by one."""
    prompts = [make_prompt(length) for length in (1, 5, 17, 60, 63, 64, 130)]
    outcomes = run(decoder, [SampleRequest(prompt, GREEDY) for prompt in prompts])
    for prompt, outcome in zip(prompts, outcomes, strict=True):
        assert outcome.tokens[0] == generate(hub_model, prompt, 40)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prepacked_weights_give_the_same_logits(dtype: torch.dtype) -> None:
    """The copy in another layout is the same matrix; and every linear has one, where this machine has the layout."""
    base = DecodeBase.load(str(pip_folder()), dtype=str(dtype).removeprefix("torch."))
    x_NI = torch.randn(40, base.info.hidden_size, generator=torch.Generator().manual_seed(1)).to(dtype)
    plain_NV = base.logits(x_NI, base.adapters([]))
    if not base.prepack():
        pytest.skip("no oneDNN on this machine")
    with torch.no_grad():
        base.unembedding.weight.zero_()  # read no more, or the next line shows it
        packed_NV = base.logits(x_NI, base.adapters([]))
    assert (packed_NV - plain_NV).abs().max() <= (1e-4 if dtype == torch.float32 else 0.05) * plain_NV.abs().max()


# PEFT warns that an adapter on a tied unembedding should not be merged.
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
def test_greedy_with_an_adapter_equals_peft(
    base: DecodeBase, decoder: Decoder, adapters: list[AdapterWeights], tmp_path: Path
) -> None:
    """Every row of a step uses its own adapter, as PEFT would alone."""
    prompt = make_prompt(23)
    outcomes = run(decoder, [SampleRequest(prompt, GREEDY, weights) for weights in [None, *adapters]])
    assert len({tuple(outcome.tokens[0]) for outcome in outcomes}) > 2
    for number, weights in enumerate(adapters):
        save_adapter(tmp_path / str(number), base, weights)
        fresh = AutoModelForCausalLM.from_pretrained(pip_folder(), dtype=torch.float32)
        theirs = peft.PeftModel.from_pretrained(fresh, str(tmp_path / str(number)))
        assert outcomes[number + 1].tokens[0] == generate(theirs, prompt, 40)


def test_logprobs_equal_a_full_forward(hub_model: PreTrainedModel, decoder: Decoder) -> None:
    """Prompt and sample log-probs are those of one pass over the whole text."""
    prompt = make_prompt(30)
    params = SamplingParams(max_tokens=50, seed=3, ignore_eos=True)
    (outcome,) = run(decoder, [SampleRequest(prompt, params, prompt_logprobs=True)])
    whole = torch.tensor([[*prompt.tolist(), *outcome.tokens[0]]])
    with torch.no_grad():
        logits_TV = hub_model(whole).logits[0].float()
    expected_T = torch.log_softmax(logits_TV[:-1], -1).gather(1, whole[0, 1:, None])[:, 0].numpy()
    assert outcome.prompt_logprobs_T is not None
    assert np.isnan(outcome.prompt_logprobs_T[0])
    np.testing.assert_allclose(outcome.prompt_logprobs_T[1:], expected_T[:29], atol=2e-5)
    np.testing.assert_allclose(outcome.logprobs[0], expected_T[29:], atol=2e-5)


def trainer_logprobs(tokens: np.ndarray, adapter: AdapterWeights, dtype: str) -> np.ndarray:
    """Return what a trainer's forward answers for the tokens after the first."""
    base = BaseModel.load(str(pip_folder()), name=PIP_NAME, dtype=dtype)
    batch = TokenBatch(
        lengths_R=np.array([len(tokens) - 1], dtype=np.int64), tokens_T=tokens[:-1], targets_TK=tokens[1:], columns={}
    )
    chunk = Chunk(TrainState.fresh(adapter), batch, LossSpec("cross_entropy", {}), forward_only=True)
    (result,) = TrainingEngine(base).run_pass([chunk])
    assert result.error is None
    return result.logprobs_TK


@pytest.mark.parametrize(
    ("dtype", "prepack", "tolerance", "drawing"),
    [("float32", False, 0.0, 2e-5), ("float32", True, 1e-5, 2e-5), ("bfloat16", True, 0.0, 0.2)],
)
def test_prompt_logprobs_are_the_trainers_bits(
    adapters: list[AdapterWeights], dtype: str, prepack: bool, tolerance: float, drawing: float
) -> None:
    """Scoring a text answers a trainer's forward, to the bit but in float32 over another layout of the weights.

    Decoding the text agrees to rounding.
    """
    base = DecodeBase.load(str(pip_folder()), name=PIP_NAME, dtype=dtype)
    if prepack:
        base.prepack()
    if dtype == "bfloat16" and choose_dtype("auto", base.device) != torch.bfloat16:
        tolerance = drawing  # without instructions for it, one layout may be computed in another way than the other
    decoder = Decoder(base)
    prompt = make_prompt(140)
    params = SamplingParams(max_tokens=60, seed=9, ignore_eos=True)
    (drawn,) = run(decoder, [SampleRequest(prompt, params, adapters[0])])
    text = np.array([*prompt, *drawn.tokens[0]], dtype=np.int32)
    (scored,) = run(decoder, [SampleRequest(text, weights=adapters[0], num_samples=0)])
    expected_T = trainer_logprobs(text, adapters[0], dtype).astype(np.float32)
    assert scored.prompt_logprobs_T is not None
    np.testing.assert_allclose(scored.prompt_logprobs_T[1:], expected_T, atol=tolerance, rtol=0)
    np.testing.assert_allclose(drawn.logprobs[0], expected_T[139:], atol=drawing)


def test_a_long_prompt_is_read_in_parts(base: DecodeBase, hub_model: PreTrainedModel) -> None:
    """A prompt of the whole context, cut on its way in, gives a full forward's log-probs."""
    prompt = make_prompt(base.info.max_context)
    (outcome,) = run(Decoder(base), [SampleRequest(prompt, num_samples=0)])
    with torch.no_grad():
        logits_TV = hub_model(torch.from_numpy(prompt.astype(np.int64))[None]).logits[0]
    expected_T = torch.log_softmax(logits_TV[:-1], -1).gather(1, torch.from_numpy(prompt[1:, None].astype(np.int64)))
    assert outcome.prompt_logprobs_T is not None
    np.testing.assert_allclose(outcome.prompt_logprobs_T[1:], expected_T[:, 0].numpy(), atol=5e-5)


def test_later_parts_attend_to_earlier_ones(
    base: DecodeBase, hub_model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts cut into parts of 16 still decode as transformers does, next to others."""
    monkeypatch.setattr("treadle_engine.decode.PREFILL_ROWS", 16)
    assert PREFILL_ROWS > 16
    prompts = [make_prompt(length) for length in (40, 16, 75)]
    outcomes = run(Decoder(base), [SampleRequest(prompt, GREEDY) for prompt in prompts])
    for prompt, outcome in zip(prompts, outcomes, strict=True):
        assert outcome.tokens[0] == generate(hub_model, prompt, 40)


@pytest.mark.parametrize("heads", [4, 2])
def test_windowed_attention_equals_transformers(tmp_path: Path, heads: int) -> None:
    """A base whose layers see a sliding window decodes as transformers does; only two heads are as wide as a vector."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=heads,
        num_key_value_heads=heads // 2, max_position_embeddings=256, use_sliding_window=True, sliding_window=8,
        max_window_layers=1, eos_token_id=2, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    windowed = DecodeBase.load(str(tmp_path), dtype="float32")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    prompts = [make_prompt(length) % 125 + 3 for length in (4, 30)]
    outcomes = run(Decoder(windowed), [SampleRequest(prompt, GREEDY) for prompt in prompts])
    for prompt, outcome in zip(prompts, outcomes, strict=True):
        assert outcome.tokens[0] == generate(theirs, prompt, 40)
