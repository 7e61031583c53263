"""What the service relies on, of every engine that may stand behind it: Treadle's own and vLLM's.

The tests of vLLM run where it can be imported, in an environment of its own; here, TREADLE_TEST_VLLM_PYTHON names the
interpreter of such an environment, with pytest and the sampler's other packages, and the same file is run by it.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import pytest
import torch

from tests.sampler.driving import Outcome, collect, run
from treadle_engine.attention import PackedCausal
from treadle_engine.bases import PIP_NAME, pip_folder
from treadle_engine.decode import Decoder
from treadle_engine.decode_base import DecodeBase
from treadle_engine.decode_requests import SampleRequest
from treadle_engine.errors import EngineError
from treadle_engine.lora import AdapterWeights, LoraConfig
from treadle_engine.outline import BaseOutline
from treadle_engine.sampling_params import SamplingParams
from treadle_engine.stops import load_detokenizer
from treadle_sampler.backend import SamplerBackend
from treadle_sampler.vllm_backend import VllmBackend

ROOT = Path(__file__).parents[2]
PYTHON = os.environ.get("TREADLE_TEST_VLLM_PYTHON", "")
HAS_VLLM = importlib.util.find_spec("vllm") is not None
TOLERANCE: Final = 0.02
"""Of a log-prob, between engines that round otherwise, in float32 over adapters in float32."""
T = TypeVar("T")


@pytest.fixture(scope="module")
def base() -> DecodeBase:
    """Pip as Treadle's own sampler loads it."""
    torch.set_num_threads(1)
    loaded = DecodeBase.load(str(pip_folder()), name=PIP_NAME, dtype="float32")
    loaded.prepack()
    return loaded


@pytest.fixture(scope="module")
def adapters(base: DecodeBase) -> list[AdapterWeights]:
    """Two adapters of different ranks that change what is said, without a part for the unembedding."""
    made = []
    for seed, rank in enumerate((8, 16)):
        weights = AdapterWeights.init(base, LoraConfig(rank=rank, alpha=2.0 * rank, seed=seed, train_unembed=False))
        generator = torch.Generator().manual_seed(seed)
        for tensor in weights.to_tensors().values():
            tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.03)
        weights.refresh()
        made.append(weights)
    return made


needs_vllm = pytest.mark.skipif(not HAS_VLLM, reason="vLLM is not in this environment")


@pytest.fixture(scope="module", params=["treadle", pytest.param("vllm", marks=needs_vllm)])
def backend(request: pytest.FixtureRequest, base: DecodeBase) -> Iterator[SamplerBackend]:
    """Each engine in turn, used by all tests."""
    detokenize = load_detokenizer(str(pip_folder()))
    if request.param == "treadle":
        yield Decoder(base, detokenize, max_sequences=8)
        return
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "0")
    outline = BaseOutline.load(str(pip_folder()), name=PIP_NAME, dtype="float32", device="cpu")
    yield VllmBackend(outline, detokenize, max_sequences=8, options={"enforce_eager": True, "max_lora_rank": 16})


def prompt_of(length: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Returns random ordinary tokens."""
    return np.random.default_rng([seed, length]).integers(3, 1024, size=length, dtype=np.int32)


def ask(length: int = 12, num_samples: int = 1, weights: AdapterWeights | None = None, **params: Any) -> SampleRequest:
    """Returns a request for a few tokens."""
    chosen = {"max_tokens": 8, "seed": 5, "ignore_eos": True, **params}
    return SampleRequest(prompt_of(length), SamplingParams(**chosen), weights, num_samples)


def refusal(call: Callable[[], T]) -> str:
    """Returns the reason for which a call is refused."""
    with pytest.raises(EngineError) as caught:
        call()
    return caught.value.reason


def texts(outcome: Outcome) -> list[list[int]]:
    """Returns the tokens of each sample in order."""
    return [outcome.tokens[index] for index in sorted(outcome.tokens)]


def test_requests_of_all_kinds_share_the_engine(backend: SamplerBackend, adapters: list[AdapterWeights]) -> None:
    """Many at once, joining late, by the base and by adapters of several ranks: each gets as much as it asked for."""
    requests = [ask(5 + 3 * place, 1 + place % 3, [None, *adapters][place % 3], seed=place) for place in range(7)]
    outcomes = run(backend, requests, joins=[0, 0, 1, 2, 2, 5, 9])
    for request, outcome in zip(requests, outcomes, strict=True):
        assert sorted(outcome.tokens) == list(range(request.num_samples))
        assert all(len(tokens) == 8 for tokens in outcome.tokens.values())
        assert set(outcome.stops.values()) == {"length"}
        assert outcome.error is None
    assert not backend.has_work
    assert backend.num_active == backend.num_waiting == 0


def test_company_and_seeds(backend: SamplerBackend, adapters: list[AdapterWeights]) -> None:
    """A seed draws the same again, alone and in company; samples of a request and other seeds differ."""
    request = ask(16, 3, adapters[0], seed=2**63 + 1)
    (alone,) = run(backend, [request])
    (again, *_) = run(backend, [request, ask(9, 2), ask(30, 1, adapters[1])])
    assert texts(alone) == texts(again)
    assert len({tuple(tokens) for tokens in texts(alone)}) == 3
    (other,) = run(backend, [ask(16, 3, adapters[0], seed=2)])
    assert not {tuple(tokens) for tokens in texts(alone)} & {tuple(tokens) for tokens in texts(other)}
    # Neighbouring seeds are no shifted samples of each other.
    (next_seed,) = run(backend, [ask(16, 3, adapters[0], seed=3)])
    assert not {tuple(tokens) for tokens in texts(other)} & {tuple(tokens) for tokens in texts(next_seed)}


def test_logprobs_are_the_models_own(backend: SamplerBackend, base: DecodeBase, adapters: list[AdapterWeights]) -> None:
    """Of drawn tokens and of prompts: those that Treadle's engine scores, and a trainer with it."""
    for weights in (None, *adapters):
        request = ask(20, 2, weights)
        request = replace(request, prompt_logprobs=True, num_top=3, prompt_top=2)
        (outcome,) = run(backend, [request])
        for index, tokens in outcome.tokens.items():
            text_T = np.concatenate([request.prompt_T, np.array(tokens, dtype=np.int32)])
            scored = SampleRequest(text_T, SamplingParams(), weights, 0, prompt_logprobs=True)
            (expected,) = run(Decoder(base), [scored])
            assert expected.prompt_logprobs_T is not None
            assert outcome.prompt_logprobs_T is not None
            assert np.allclose(outcome.logprobs[index], expected.prompt_logprobs_T[20:], atol=TOLERANCE)
            assert np.isnan(outcome.prompt_logprobs_T[0])
            assert np.allclose(outcome.prompt_logprobs_T[1:], expected.prompt_logprobs_T[1:20], atol=TOLERANCE)


def test_logprobs_are_those_of_the_tempered_distribution(backend: SamplerBackend, base: DecodeBase) -> None:
    """At a temperature, with penalties and biases: those of what is drawn from; greedy ones at temperature 1."""
    cases = [
        {"temperature": 0.5},
        {"temperature": 0.0},
        {"temperature": 0.7, "presence_penalty": 0.6, "frequency_penalty": 0.4, "repetition_penalty": 1.3},
        {"temperature": 1.0, "logit_bias": ((700, 3.0), (701, -4.0))},
    ]
    for case in cases:
        greedy_or_not = ask(14, 1, **case)
        (outcome,) = run(backend, [greedy_or_not])
        # Computed here from the base's logits, token by token.
        expected = [
            _logprob(base, greedy_or_not, outcome.tokens[0][:place], outcome.tokens[0][place]) for place in range(8)
        ]
        assert np.allclose(outcome.logprobs[0], expected, atol=TOLERANCE)


def _logprob(base: DecodeBase, request: SampleRequest, drawn: list[int], token: int) -> float:
    """Returns a token's log-prob by the documented order: bias, penalties, temperature."""
    params = request.params
    text_T = np.concatenate([request.prompt_T, np.array(drawn, dtype=np.int32)])
    tokens_T, positions_T = torch.from_numpy(text_T.astype(np.int64)), torch.arange(len(text_T))
    with torch.no_grad():
        x_TD = base.hidden(tokens_T, positions_T, PackedCausal([len(text_T)], base.device), base.adapters(()))
        logits_V = base.logits(x_TD[-1:], base.adapters(()))[0]
    for biased, bias in params.logit_bias:
        logits_V[biased] += bias
    for seen in set(text_T.tolist()):
        logits_V[seen] *= params.repetition_penalty if logits_V[seen] < 0 else 1 / params.repetition_penalty
    for seen in drawn:
        logits_V[seen] -= params.frequency_penalty
    for seen in set(drawn):
        logits_V[seen] -= params.presence_penalty
    return float((logits_V / (params.temperature or 1.0)).log_softmax(-1)[token])


def test_samples_end_where_they_should(backend: SamplerBackend) -> None:
    """At a stop token, kept once; at a stop string across tokens; at the end of sequence; at the limit."""
    detokenize = load_detokenizer(str(pip_folder()))
    (free,) = run(backend, [ask(10, 1, max_tokens=12)])
    tokens = free.tokens[0]
    (stopped,) = run(backend, [ask(10, 1, max_tokens=12, stop_tokens=(tokens[4],))])
    first = tokens.index(tokens[4])
    assert stopped.tokens[0] == tokens[: first + 1]
    assert stopped.stops[0] == "stop"
    place = next(place for place in range(2, 10) if len(detokenize(tokens[place : place + 2]).strip()) >= 2)
    wanted = detokenize(tokens[place : place + 2])[-2:]
    if "\ufffd" not in wanted:
        (cut,) = run(backend, [ask(10, 1, max_tokens=12, stop_strings=(wanted,))])
        ends = [end for end in range(1, 13) if wanted in detokenize(tokens[:end])]
        assert cut.tokens[0] == tokens[: ends[0]]
        assert cut.stops[0] == "stop"
    (ended,) = run(backend, [ask(10, 1, max_tokens=12, ignore_eos=False, logit_bias=((2, 100.0),))])
    assert ended.tokens[0] == [2]
    assert ended.stops[0] == "stop"


def test_a_cancelled_request_says_nothing_more(backend: SamplerBackend) -> None:
    """Nor do others notice; to cancel again, or what is unknown, is no error."""
    (expected,) = run(backend, [ask(11, 2, seed=8)])
    outcomes: dict[int, Outcome] = {}
    kept, dropped = backend.add(ask(11, 2, seed=8)), backend.add(ask(13, 3, seed=9, max_tokens=64))
    for _ in range(3):
        collect(outcomes, backend.step())
    backend.cancel(dropped)
    seen = dict(outcomes.get(dropped, Outcome()).tokens)
    while backend.has_work:
        collect(outcomes, backend.step())
    backend.cancel(dropped)
    backend.cancel(10_000)
    assert dict(outcomes.get(dropped, Outcome()).tokens) == seen
    assert not outcomes.get(dropped, Outcome()).stops
    assert texts(outcomes[kept]) == texts(expected)


def test_what_is_wrong_is_refused_before_it_costs_anything(backend: SamplerBackend) -> None:
    """By the same reasons, whatever the engine."""
    assert refusal(lambda: backend.add(ask(500, max_tokens=100))) == "CONTEXT_OVERFLOW"
    assert refusal(lambda: backend.add(ask(temperature=-1.0))) == "BAD_SAMPLING_PARAMS"
    outside = SampleRequest(np.array([5, 2000], dtype=np.int32))
    assert refusal(lambda: backend.add(outside)) == "TOKEN_OUT_OF_RANGE"
    assert not backend.has_work


def test_a_prompt_alone_is_scored(backend: SamplerBackend, base: DecodeBase) -> None:
    """Without a sample, and from the last positions on if so asked."""
    request = SampleRequest(prompt_of(40), SamplingParams(), None, 0, prompt_logprobs=True)
    for last_n in (None, 6):
        (found,), (expected,) = (run(one, [replace(request, last_n=last_n)]) for one in (backend, Decoder(base)))
        assert found.prompt_logprobs_T is not None
        assert expected.prompt_logprobs_T is not None
        assert not found.tokens
        assert np.allclose(found.prompt_logprobs_T, expected.prompt_logprobs_T, atol=TOLERANCE, equal_nan=True)


def test_a_whole_context_can_be_drawn(backend: SamplerBackend) -> None:
    """Up to the last position."""
    (outcome,) = run(backend, [ask(500, 1, max_tokens=12)])
    assert len(outcome.tokens[0]) == 12


@needs_vllm
@pytest.mark.parametrize("backend", ["vllm"], indirect=True)
def test_what_vllm_cannot_do_is_refused(backend: SamplerBackend, base: DecodeBase) -> None:
    """Rather than done otherwise than documented."""
    for cut in ({"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}):
        assert refusal(lambda cut=cut: backend.add(ask(**cut))) == "BAD_SAMPLING_PARAMS"
    targets = replace(ask(), targets_TK=np.full((12, 1), 7, dtype=np.int32))
    assert refusal(lambda: backend.add(targets)) == "BAD_SAMPLING_PARAMS"
    large = AdapterWeights.init(base, LoraConfig(rank=32, train_unembed=False))
    assert refusal(lambda: backend.add(ask(weights=large))) == "INCOMPATIBLE_ADAPTER"
    whole = AdapterWeights.init(base, LoraConfig(rank=8))
    assert refusal(lambda: backend.add(ask(weights=whole))) == "INCOMPATIBLE_ADAPTER"


@pytest.mark.skipif(HAS_VLLM, reason="vLLM is here")
def test_without_vllm_the_error_says_how_to_get_it() -> None:
    """A sampler with this setting in an environment without it."""
    outline = BaseOutline.load(str(pip_folder()), name=PIP_NAME, dtype="float32", device="cpu")
    with pytest.raises(EngineError, match="pip install vllm"):
        VllmBackend(outline, None, max_sequences=8)


@pytest.mark.skipif(not PYTHON, reason="TREADLE_TEST_VLLM_PYTHON names no interpreter with vLLM")
@pytest.mark.timeout(1800)
def test_the_same_tests_hold_with_vllm() -> None:
    """This file, run where vLLM is."""
    folders = [ROOT / part for part in (".", "client", "common", "sampler_svc")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders)), "HF_HUB_OFFLINE": "1"}
    del environment["TREADLE_TEST_VLLM_PYTHON"]
    command = [PYTHON, "-m", "pytest", "--noconftest", "-c", "/dev/null", "--rootdir", str(ROOT), "-q", __file__]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.skipif(not PYTHON, reason="TREADLE_TEST_VLLM_PYTHON names no interpreter with vLLM")
@pytest.mark.timeout(1800)
def test_a_sampler_with_vllm_serves_what_a_trainer_publishes(tmp_path: Path) -> None:
    """The whole service, and its log-probs beside the trainer's."""
    from tests.support.cluster import Cluster
    from treadle import AdamParams, Datum, ModelInput, ServiceClient, TensorData
    from treadle import SamplingParams as Params

    running = Cluster(tmp_path / "cluster")
    running.folder.mkdir()
    try:
        for name in ("store", "trainer", "gateway"):
            running.launch(name)
        folders = [ROOT / part for part in ("client", "common", "sampler_svc")]
        own = {
            "PYTHONPATH": os.pathsep.join(map(str, folders)),
            "TREADLE_SAMPLER_BACKEND": "vllm",
            "TREADLE_SAMPLER_VLLM_OPTIONS": '{"enforce_eager": true, "max_lora_rank": 16}',
            "VLLM_CPU_KVCACHE_SPACE": "1",
        }
        with (running.folder / "sampler.log").open("ab") as log:
            running.processes["sampler"] = subprocess.Popen(
                [PYTHON, "-m", "treadle_sampler"], env=running.environment("sampler") | own, stdout=log, stderr=log
            )
        running.wait_ready()
        with ServiceClient(running.gateway_address, running.new_tenant()) as service:
            training = service.create_lora_training_client("treadle/pip", rank=8, seed=3, train_unembed=False)
            tokens = prompt_of(31).tolist()

            def datum(text: list[int]) -> Datum:
                inputs = {
                    "target_tokens": TensorData.from_numpy(np.array(text[1:])),
                    "weights": TensorData.from_numpy(np.ones(len(text) - 1, dtype=np.float32)),
                }
                return Datum(ModelInput.from_ints(text[:-1]), inputs)

            for _ in range(3):
                training.forward_backward([datum(tokens)], "cross_entropy")
                training.optim_step(AdamParams(learning_rate=5e-3)).result(120)
            sampling = training.save_weights_and_get_sampling_client()
            drawn = sampling.sample(ModelInput.from_ints(tokens[:12]), 1, Params(max_tokens=8, seed=1)).result(300)
            (sequence,) = drawn.sequences
            scored = training.forward([datum([*tokens[:12], *sequence.tokens])], "cross_entropy").result(120)
            expected = scored.loss_fn_outputs[0]["logprobs"].to_numpy()[11:]
            assert sequence.logprobs is not None
            assert np.allclose(list(sequence.logprobs), expected, atol=TOLERANCE)
    finally:
        running.close()
