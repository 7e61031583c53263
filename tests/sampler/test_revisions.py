"""Revisions come to a sampler ahead of requests, go when they are deleted, and each request gets exactly its own."""

from __future__ import annotations

import asyncio
from pathlib import Path

import torch

from tests.sampler.conftest import make_prompt
from tests.sampler.driving import run
from tests.sampler.harness import TOKEN, Bench, ask, serving, tokens_of
from treadle.v1 import adapters_pb2, adapters_pb2_grpc
from treadle_engine.decode import Decoder
from treadle_engine.decode_base import DecodeBase
from treadle_engine.decode_requests import SampleRequest
from treadle_engine.lora import AdapterWeights, LoraConfig
from treadle_engine.sampling_params import SamplingParams
from treadle_sampler.revision_source import StoreSource
from treadle_service.store_client import StoreClient


def make_weights(base: DecodeBase, seed: int, rank: int = 2) -> AdapterWeights:
    """Return an adapter whose effect is far above rounding."""
    weights = AdapterWeights.init(base, LoraConfig(rank=rank, alpha=2 * rank, seed=seed, train_unembed=False))
    weights.flat.add_(torch.randn(weights.flat.shape, generator=torch.Generator().manual_seed(seed)), alpha=0.1)
    weights.refresh()
    return weights


def expected_tokens(base: DecodeBase, weights: AdapterWeights, max_tokens: int = 4) -> list[int]:
    """Return what the engine alone draws for `ask`'s prompt and seed."""
    params = SamplingParams(max_tokens=max_tokens, seed=1, ignore_eos=True)
    (outcome,) = run(Decoder(base), [SampleRequest(make_prompt(12), params, weights, 1)])
    return outcome.tokens[0]


async def cached(bench: Bench, model: str, there: bool = True) -> None:
    """Wait until the sampler has, or no longer has, a revision."""
    async with asyncio.timeout(20):
        while (model in (await bench.status()).cached_revisions) != there:
            await asyncio.sleep(0.01)


async def few_cached(bench: Bench, limit: int) -> None:
    """Wait until the sampler holds no more than so many: what is in use or on its way stays beyond its bound."""
    async with asyncio.timeout(20):
        while len((await bench.status()).cached_revisions) > limit:
            await asyncio.sleep(0.01)


async def test_new_revisions_are_there_before_anybody_asks(
    tmp_path: Path, base: DecodeBase, adapters: list[AdapterWeights]
) -> None:
    """Sent or mapped, a published revision is loaded by the news of it, and answers as the engine does."""
    for place, shared in (("sent", None), ("shared", tmp_path / "shared" / "blobs")):
        async with serving(tmp_path / place, shared_blobs=shared) as bench:
            model = await bench.publish(base, adapters[0], "one")
            await cached(bench, model)
            response = await bench.sample(ask(model, max_tokens=4))
            assert tokens_of(response) == [expected_tokens(base, adapters[0])]


async def test_without_prefetch_revisions_come_when_asked_for(
    tmp_path: Path, base: DecodeBase, adapters: list[AdapterWeights]
) -> None:
    """The news alone loads nothing; the first request does."""
    async with serving(tmp_path, prefetch="off") as bench:
        model = await bench.publish(base, adapters[0], "one")
        await bench.sample(ask())
        assert list((await bench.status()).cached_revisions) == []
        await bench.sample(ask(model))
        assert list((await bench.status()).cached_revisions) == [model]


async def test_a_deleted_revision_is_gone_at_once(
    tmp_path: Path, base: DecodeBase, adapters: list[AdapterWeights]
) -> None:
    """The news drops it long before its next look at the store is due."""
    async with serving(tmp_path, lookup_seconds=3600.0) as bench:
        model = await bench.publish(base, adapters[0], "one")
        await bench.sample(ask(model))
        stub = adapters_pb2_grpc.AdapterServiceStub(bench.store_channel)
        await stub.DeleteRevision(adapters_pb2.DeleteRevisionRequest(name=model), metadata=bench.internal)
        await cached(bench, model, there=False)
        assert await bench.refusal(ask(model)) == "MODEL_NOT_FOUND"


async def test_a_broken_revision_breaks_nobody_else(
    tmp_path: Path, base: DecodeBase, adapters: list[AdapterWeights]
) -> None:
    """Weights that are not finite are refused when loaded; the run's other revisions go on answering."""
    async with serving(tmp_path) as bench:
        good = await bench.publish(base, adapters[0], "good")
        broken = make_weights(base, seed=9)
        broken.flat[7] = float("nan")
        bad = await bench.publish(base, broken, "bad")
        assert await bench.refusal(ask(bad)) == "BAD_ADAPTER_FILE"
        response = await bench.sample(ask(good, max_tokens=4))
        assert tokens_of(response) == [expected_tokens(base, adapters[0])]


async def test_each_request_gets_its_own_revision_while_others_come_and_go(tmp_path: Path, base: DecodeBase) -> None:
    """Room for three, eight in use and new ones published meanwhile: every answer is that of the named weights."""
    async with serving(tmp_path, max_cached_adapters=3) as bench:
        weights = [make_weights(base, seed) for seed in range(8)]
        models = [await bench.publish(base, one, f"v{index}") for index, one in enumerate(weights)]
        expected = [[expected_tokens(base, one, 16)] for one in weights]

        async def publish_more() -> None:
            for index in range(12):
                await bench.publish(base, weights[index % 8], f"more-{index}", tenant="other")

        async def ask_often(index: int) -> None:
            for _ in range(3):
                assert tokens_of(await bench.sample(ask(models[index], max_tokens=16))) == expected[index]

        await asyncio.gather(publish_more(), *(ask_often(index) for index in range(8)))
        await few_cached(bench, 3)


async def test_hundreds_of_revisions_on_one_sampler(tmp_path: Path, base: DecodeBase) -> None:
    """Three hundred, all different, all asked for at once; the memory that they may take holds a part of them."""
    weights = [make_weights(base, seed, rank=1) for seed in range(300)]
    budget = 100 * weights[0].num_bytes
    async with serving(tmp_path, max_cached_bytes=budget) as bench:
        models = await asyncio.gather(*(bench.publish(base, one, f"v{index}") for index, one in enumerate(weights)))
        responses = await asyncio.gather(*(bench.sample(ask(model, max_tokens=2)) for model in models))
        await few_cached(bench, 100)
        for index in range(0, 300, 30):
            assert tokens_of(responses[index]) == [expected_tokens(base, weights[index], 2)]
        assert len({tuple(tokens_of(response)[0]) for response in responses}) > 30


async def test_the_next_revision_of_a_run_comes_as_differences(tmp_path: Path, base: DecodeBase) -> None:
    """With files kept, weights that moved a little cost a part of their bytes and arrive bit for bit."""
    first = make_weights(base, seed=1, rank=8)
    second = make_weights(base, seed=1, rank=8)
    second.flat[: len(second.flat) // 8].mul_(1.001)
    second.refresh()
    async with serving(tmp_path, prefetch="off") as bench:
        run_name = await bench.new_run(8)
        models = [await bench.save(run_name, base, one, f"v{n}") for n, one in enumerate((first, second))]
        client = StoreClient(bench.store_address, TOKEN)
        source = StoreSource(client, base, 2**26)
        received = []
        for model, weights in zip(models, (first, second), strict=True):
            before = client.num_received_bytes
            loaded = await source.load(await source.lookup(model))
            received.append(client.num_received_bytes - before)
            assert torch.equal(loaded.flat, weights.flat)
        await client.close()
    assert received[1] < received[0] / 4
