"""The sampler service over gRPC with a real store: answers, names, isolation, cancellation, limits."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import google_crc32c
import grpc
import numpy as np
import pytest
import pytest_asyncio
from transformers import AutoTokenizer

from tests.sampler.conftest import make_prompt
from tests.sampler.driving import run
from tests.sampler.harness import Bench, as_tenant, ask, floats_of, serving, tokens_of
from treadle.errors import from_rpc_error
from treadle.internal.v1 import sampler_pb2
from treadle.tensors import tensor_from_numpy
from treadle.v1 import sampling_pb2, types_pb2
from treadle.wire import decode_tokens, encode_tokens
from treadle_engine.bases import PIP_NAME, pip_folder
from treadle_engine.decode import Decoder
from treadle_engine.decode_base import DecodeBase
from treadle_engine.decode_requests import SampleRequest
from treadle_engine.lora import AdapterWeights
from treadle_engine.sampling_params import SamplingParams


@pytest_asyncio.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    """A running store and sampler."""
    async with serving(tmp_path) as running:
        yield running


async def test_answers_are_the_engines_bits(bench: Bench, base: DecodeBase, adapters: list[AdapterWeights]) -> None:
    """A revision from the store, in company of the base, answers what the decoder answers when called directly."""
    model = await bench.publish(base, adapters[0], "one")
    request = ask(model, num_samples=3)
    request.prompt_logprobs = True
    response, _ = await asyncio.gather(bench.sample(request), bench.sample(ask(num_samples=4)))
    params = SamplingParams(max_tokens=8, seed=1, ignore_eos=True)
    (expected,) = run(Decoder(base), [SampleRequest(make_prompt(12), params, adapters[0], 3, prompt_logprobs=True)])
    assert tokens_of(response) == [expected.tokens[index] for index in range(3)]
    assert [floats_of(one.logprobs) for one in response.sequences] == [expected.logprobs[index] for index in range(3)]
    assert expected.prompt_logprobs_T is not None
    assert response.prompt_logprobs.data == expected.prompt_logprobs_T.tobytes()
    assert response.model == model


async def test_streaming_equals_unary(bench: Bench) -> None:
    """The stream carries the same tokens and log-probs, one stop reason per sample, the model once."""
    request = ask(num_samples=2, max_tokens=6)
    request.prompt_logprobs = True
    whole = await bench.sample(request)
    tokens: list[list[int]] = [[], []]
    stops: list[int] = []
    messages = []
    stream = bench.sampling.StreamSample(
        sampling_pb2.StreamSampleRequest(request=request), metadata=as_tenant("acme"), timeout=60
    )
    async for message in stream:
        messages.append(message)
        tokens[message.index] += decode_tokens(message.tokens).tolist()
        stops += [message.stop_reason] if message.stop_reason else []
    assert tokens == tokens_of(whole)
    assert stops == [sampling_pb2.STOP_REASON_LENGTH] * 2
    assert [message.model for message in messages] == [PIP_NAME] + [""] * (len(messages) - 1)
    assert messages[0].prompt_logprobs == whole.prompt_logprobs


async def test_the_tokenizer_of_a_base_travels_as_data(
    bench: Bench, base: DecodeBase, adapters: list[AdapterWeights]
) -> None:
    """Whole and checked, by the base's name or a revision's; nothing but its name once it is known; not to others."""
    model = await bench.publish(base, adapters[0], "one")

    async def fetch(known: str = "", name: str = model, tenant: str = "acme") -> tuple[Any, bytes]:
        request = sampling_pb2.GetTokenizerRequest(model=name, known_sha256=known)
        frames = [f async for f in bench.sampling.GetTokenizer(request, metadata=as_tenant(tenant), timeout=60)]
        assert all(google_crc32c.value(frame.chunk.data) == frame.chunk.crc32c for frame in frames[1:])
        return frames[0].header, b"".join(frame.chunk.data for frame in frames[1:])

    header, content = await fetch()
    itself = AutoTokenizer.from_pretrained(str(pip_folder()))
    assert len(content) == header.size
    assert content.decode() == itself.backend_tokenizer.to_str()
    assert (header.chat_template, dict(header.special_tokens)) == (itself.chat_template, itself.special_tokens_map)
    assert (header.max_context, header.vocab_size) == (base.info.max_context, base.info.vocab_size)
    assert tuple(header.eos_token_ids) == base.info.eos_token_ids
    assert await fetch(name=PIP_NAME) == (header, content)
    assert await fetch(header.sha256) == (header, b"")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await fetch(tenant="nosy")
    assert from_rpc_error(caught.value).reason == "MODEL_NOT_FOUND"


async def test_a_list_is_answered_with_lists(bench: Bench) -> None:
    """Who types a prompt as a list reads lists: the same numbers, 0 where there is none."""
    packed = ask()
    packed.prompt_logprobs = True
    listed = sampling_pb2.SampleRequest.FromString(packed.SerializeToString())
    listed.prompt.list.CopyFrom(types_pb2.TokenList(ids=make_prompt(12).tolist()))
    one, other = await bench.sample(packed), await bench.sample(listed)
    assert list(other.sequences[0].tokens.list.ids) == tokens_of(one)[0]
    assert list(other.sequences[0].logprobs_list) == floats_of(one.sequences[0].logprobs)
    assert list(other.prompt_logprobs_list)[1:] == floats_of(one.prompt_logprobs)[1:]
    assert other.prompt_logprobs_list[0] == 0.0


async def test_compute_logprobs_equals_prompt_logprobs(bench: Bench) -> None:
    """Scoring a text is reading it as a prompt, to rounding: its last token need not be read."""
    request = ask()
    request.prompt_logprobs = True
    scored = await bench.sampling.ComputeLogprobs(
        sampling_pb2.ComputeLogprobsRequest(model=PIP_NAME, tokens=request.prompt), metadata=as_tenant("acme")
    )
    read = floats_of((await bench.sample(request)).prompt_logprobs)
    np.testing.assert_allclose(floats_of(scored.logprobs), read, atol=1e-5)
    assert math.isnan(floats_of(scored.logprobs)[0])


async def test_a_fresh_seed_each_time_unless_given(bench: Bench) -> None:
    """Without a seed two calls differ; with one they agree."""
    free = ask(max_tokens=30)
    free.params.ClearField("seed")
    fixed = ask(max_tokens=30)
    assert tokens_of(await bench.sample(free)) != tokens_of(await bench.sample(free))
    assert tokens_of(await bench.sample(fixed)) == tokens_of(await bench.sample(fixed))


async def test_other_tenants_models_are_not_found(
    bench: Bench, base: DecodeBase, adapters: list[AdapterWeights]
) -> None:
    """Not yours, not there, of another kind and misspelt are one answer; a cached revision is no exception."""
    model = await bench.publish(base, adapters[0], "one")
    await bench.sample(ask(model))
    absent = model.replace("/one", "/two")
    for name in (absent, "gpt-9", "", model.replace("revisions", "checkpoints")):
        assert await bench.refusal(ask(name)) == "MODEL_NOT_FOUND"
    assert await bench.refusal(ask(model), tenant="rival") == "MODEL_NOT_FOUND"
    # A failed lookup is not remembered.
    assert await bench.refusal(ask(model)) == "none"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"max_tokens": 0}, "BAD_SAMPLING_PARAMS"),
        ({"temperature": -1.0}, "BAD_SAMPLING_PARAMS"),
        ({"temperature": float("nan")}, "BAD_SAMPLING_PARAMS"),
        ({"top_p": 0.0}, "BAD_SAMPLING_PARAMS"),
        ({"top_p": 1.5}, "BAD_SAMPLING_PARAMS"),
        ({"top_k": -2}, "BAD_SAMPLING_PARAMS"),
        ({"stop_strings": [""]}, "BAD_SAMPLING_PARAMS"),
        ({"stop_tokens": [5000]}, "TOKEN_OUT_OF_RANGE"),
        ({"num_samples": 1025}, "BAD_SAMPLING_PARAMS"),
        ({"num_samples": 2**32 - 1}, "BAD_SAMPLING_PARAMS"),
        ({"max_tokens": 501}, "CONTEXT_OVERFLOW"),
        ({"length": 513}, "CONTEXT_OVERFLOW"),
        ({"length": 512, "max_tokens": None}, "CONTEXT_OVERFLOW"),
    ],
)
async def test_bad_parameters_are_refused(bench: Bench, changes: dict[str, object], reason: str) -> None:
    """Each mistake has its reason, and the sampler goes on."""
    assert await bench.refusal(ask(**changes)) == reason  # type: ignore[arg-type]
    assert (await bench.status()).active_sequences == 0


async def test_bad_prompts_are_refused(bench: Bench) -> None:
    """No token, a token outside the vocabulary, half a token."""
    for prompt, reason in (
        (types_pb2.Tokens(), "BAD_SAMPLING_PARAMS"),
        (types_pb2.Tokens(list=types_pb2.TokenList(ids=[5, 1024])), "TOKEN_OUT_OF_RANGE"),
        (types_pb2.Tokens(list=types_pb2.TokenList(ids=[-1])), "TOKEN_OUT_OF_RANGE"),
        (types_pb2.Tokens(packed=b"abc"), "BAD_SHAPE"),
    ):
        request = ask()
        request.prompt.CopyFrom(prompt)
        assert await bench.refusal(request) == reason


async def _idle(bench: Bench) -> None:
    """Wait until the sampler holds nothing."""
    while (status := await bench.status()).active_sequences or status.waiting_sequences:
        await asyncio.sleep(0.02)


async def test_a_cancelled_call_frees_its_places(tmp_path: Path) -> None:
    """A client that goes away, and one whose deadline passes, hold nothing any longer; others get their place."""
    async with serving(tmp_path, max_sequences=2) as bench:
        long = ask(num_samples=6, max_tokens=450)
        gone = bench.sampling.Sample(long, metadata=as_tenant("acme"))
        stream = bench.sampling.StreamSample(sampling_pb2.StreamSampleRequest(request=long), metadata=as_tenant("acme"))
        await stream.read()
        gone.cancel()
        stream.cancel()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await bench.sampling.Sample(long, metadata=as_tenant("acme"), timeout=0.2)
        assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        await asyncio.wait_for(_idle(bench), 30)


async def test_the_queue_is_bounded(tmp_path: Path) -> None:
    """One request too many is refused, to be tried again, and hurts nobody."""
    async with serving(tmp_path, max_requests=2) as bench:
        calls = [asyncio.ensure_future(bench.refusal(ask(max_tokens=100))) for _ in range(6)]
        reasons = await asyncio.gather(*calls)
    assert "QUEUE_FULL" in reasons
    assert reasons.count("none") >= 2
    assert set(reasons) == {"none", "QUEUE_FULL"}


async def test_few_adapters_stay_in_memory(tmp_path: Path, base: DecodeBase, adapters: list[AdapterWeights]) -> None:
    """Evicted revisions come back with the same numbers."""
    async with serving(tmp_path, max_cached_adapters=2, prefetch="off") as bench:
        models = [await bench.publish(base, weights, f"r{place}") for place, weights in enumerate(adapters)]
        first = [tokens_of(await bench.sample(ask(model))) for model in models]
        assert list((await bench.status()).cached_revisions) == models[-2:]
        together = await asyncio.gather(*(bench.sample(ask(model)) for model in models))
        assert [tokens_of(response) for response in together] == first


async def test_prefetch_and_status_are_for_services_only(
    bench: Bench, base: DecodeBase, adapters: list[AdapterWeights]
) -> None:
    """A service may fill the cache ahead; a tenant may not look behind the curtain."""
    model = await bench.publish(base, adapters[1], "one")
    await bench.control.PrefetchRevision(sampler_pb2.PrefetchRevisionRequest(name=model), metadata=bench.internal)
    assert list((await bench.status()).cached_revisions) == [model]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await bench.control.GetSamplerStatus(sampler_pb2.GetSamplerStatusRequest(), metadata=as_tenant("acme"))
    assert from_rpc_error(caught.value).reason == "PERMISSION_DENIED"


async def test_the_store_knows_the_sampler(bench: Bench) -> None:
    """The sampler is registered with its base before it says that it is ready."""
    (entry,) = await bench.live_workers()
    assert entry.worker.worker == "sampler-0"
    assert entry.base.name == PIP_NAME
    assert entry.base.sampleable
    assert list(entry.base.eos_token_ids) == [2]


async def test_empty_and_packed_prompts_round_trip(bench: Bench) -> None:
    """A one-token prompt works, and the default number of samples is one."""
    request = ask(length=1, num_samples=0)
    request.prompt.CopyFrom(encode_tokens(make_prompt(1)))
    assert len(tokens_of(await bench.sample(request))) == 1


async def test_tables_and_parameters_cross_the_wire(bench: Bench) -> None:
    """Bias, penalties and tables of log-probs do over gRPC, in one answer and streamed, what they do in the engine."""
    request = ask(length=100, max_tokens=4)
    request.params.logit_bias[77] = 100.0
    request.params.presence_penalty = 10.0
    request.topk_logprobs, request.topk_prompt_logprobs = 3, 2
    targets = np.stack([make_prompt(100), np.full(100, -1, dtype=np.int32)], axis=1)
    request.target_prompt_tokens.CopyFrom(tensor_from_numpy(targets))
    request.prompt_logprobs = True
    whole = await bench.sample(request)
    (sequence,) = whole.sequences
    assert decode_tokens(sequence.tokens).tolist() == [77] * 4
    assert decode_tokens(sequence.topk_logprobs.tokens).reshape(4, 3)[:, 0].tolist() == [77] * 4
    assert floats_of(sequence.topk_logprobs.logprobs)[::3] == floats_of(sequence.logprobs)
    assert floats_of(whole.target_prompt_logprobs)[2::2] == floats_of(whole.prompt_logprobs)[1:]
    assert len(decode_tokens(whole.topk_prompt_logprobs.tokens)) == 200
    asked = sampling_pb2.StreamSampleRequest(request=request)
    messages = [one async for one in bench.sampling.StreamSample(asked, metadata=as_tenant("acme"), timeout=60)]
    assert messages[0].topk_prompt_logprobs == whole.topk_prompt_logprobs
    assert messages[0].target_prompt_logprobs.data == whole.target_prompt_logprobs.data
    assert floats_of(messages[3].topk_logprobs.logprobs) == floats_of(sequence.topk_logprobs.logprobs)[-3:]


async def test_a_known_beginning_is_counted(bench: Bench) -> None:
    """The second request with a prompt computes its end alone, and says so; the tokens are the same."""
    first, second = await bench.sample(ask(length=140)), await bench.sample(ask(length=140))
    assert (first.prompt_cache_hit_tokens, second.prompt_cache_hit_tokens) == (0, 128)
    assert tokens_of(first) == tokens_of(second)


async def test_tables_that_fit_no_message_are_refused(bench: Bench) -> None:
    """Who asks for the whole vocabulary at every position of a long prompt reads how much fits."""
    request = ask(length=500, max_tokens=1)
    request.topk_prompt_logprobs = 1024
    assert await bench.refusal(request) == "BAD_SAMPLING_PARAMS"
