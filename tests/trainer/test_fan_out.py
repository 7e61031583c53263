"""One user's big batch over several trainers: the bits of one trainer, whoever helps, refuses, computes otherwise."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import REGISTRY

from tests.trainer.harness import (
    Bench,
    batch,
    columns,
    forward_backward,
    metadata_of,
    optim_step,
    refused,
    serving_store,
    serving_trainer,
)
from treadle.errors import from_rpc_error
from treadle.internal.v1 import trainer_pb2
from treadle.v1 import training_pb2
from treadle.wire import tensor_from_numpy
from treadle_trainer import counters

pytestmark = pytest.mark.timeout(300)
CHUNKS = 5
# At most three rows of 256 to 512 positions fit a chunk.
BIG = {"rows": 2 * CHUNKS, "length": 512}


@asynccontextmanager
async def trainers(folder: Path, count: int, **changes: object) -> AsyncIterator[list[Bench]]:
    """Serves a store and so many trainers of one base."""
    async with AsyncExitStack() as stack:
        store = await stack.enter_async_context(serving_store(folder))
        yield [
            await stack.enter_async_context(
                serving_trainer(
                    store.address, **{"worker": f"trainer-{number}", "max_tokens_per_pass": 1024, **changes}
                )
            )
            for number in range(count)
        ]


def big_steps() -> list[training_pb2.Operation]:
    """Returns a step of a big forward_backward, a forward and a small batch, and one of a big batch alone."""
    loss = training_pb2.LossFn(name="cross_entropy")
    forward = training_pb2.Operation(seq=2, forward=training_pb2.Forward(batch=batch(2, **BIG), loss_fn=loss))
    first = [forward_backward(1, seed=1, **BIG), forward, forward_backward(3, seed=3), optim_step(4)]
    return [*first, forward_backward(5, seed=5, **BIG), optim_step(6)]


async def train(bench: Bench, operations: list[training_pb2.Operation]) -> list[bytes]:
    """Runs operations and returns their results without times, and the content of the weights behind them."""
    run = await bench.new_run(rank=4)
    save = training_pb2.Operation(seq=len(operations) + 1)
    save.save_weights_for_sampler.SetInParent()
    async with bench.stream(run) as stream:
        await stream.send(*operations, save)
        results = await stream.results(len(operations) + 1)
    for result in results:
        assert not result.HasField("error"), result.error
        result.ClearField("queued")
        result.ClearField("ran")
    content = results.pop().save_weights_for_sampler.revision.rpartition("/")[2]
    return [content.encode(), *(result.SerializeToString(deterministic=True) for result in results)]


def num_helped() -> float:
    """Returns how many chunks were computed for another trainer, over all trainers of this process."""
    return counters.LENT_CHUNKS.labels("OK")._value.get()


def num_refused(reason: str) -> float:
    """Returns how many calls of ComputeChunks ended with a reason, over all trainers of this process."""
    samples = [sample for metric in REGISTRY.collect() for sample in metric.samples]
    return sum(
        sample.value
        for sample in samples
        if sample.name == "treadle_rpc_errors_total"
        and sample.labels["reason"] == reason
        and sample.labels["method"].endswith("ComputeChunks")
    )


async def test_a_big_batch_has_the_same_bits_on_one_trainer_and_on_three(tmp_path: Path) -> None:
    """Outputs, gradient norms and the weights are equal; helpers computed chunks in passes of the run's name."""
    async with trainers(tmp_path / "one", 1) as (alone,):
        expected = await train(alone, big_steps())
    before = num_helped()
    async with trainers(tmp_path / "three", 3) as (home, *helpers):
        # The first batch may be through before its helpers have been found.
        for _ in range(5):
            assert await train(home, big_steps()) == expected
            if num_helped() - before >= 3:
                break
        passes = [one for helper in helpers for one in await helper.passes()]
    assert num_helped() - before >= 3
    assert {share.run.split("/")[1] for one in passes for share in one.shares} == {"acme"}


@pytest.mark.parametrize(
    ("helper", "reason"),
    [({"fan_out": "off"}, "UNAVAILABLE"), ({"fan_out_bytes": 0}, "QUEUE_FULL"), ({"dtype": "bfloat16"}, "")],
)
async def test_who_refuses_or_computes_otherwise_is_left_alone(
    tmp_path: Path, helper: dict[str, object], reason: str
) -> None:
    """The batch is computed at home, to the same bits; one that computes otherwise is counted."""
    operations = [forward_backward(1, seed=1, **BIG), optim_step(2)]

    def num_left_alone() -> float:
        return num_refused(reason) if reason else counters.UNLIKE_TRAINERS._value.get()

    async with AsyncExitStack() as stack:
        store = await stack.enter_async_context(serving_store(tmp_path / "store"))
        home = await stack.enter_async_context(serving_trainer(store.address, max_tokens_per_pass=1024))
        expected = await train(home, operations)
        helped, before = num_helped(), num_left_alone()
        other = await stack.enter_async_context(serving_trainer(store.address, worker="trainer-1", **helper))
        for _ in range(8):
            assert await train(home, operations) == expected
            if num_left_alone() > before:
                break
        assert num_left_alone() > before
        assert await other.passes() == []
    assert num_helped() == helped


async def test_a_chunk_that_fails_fails_its_operation_as_it_would_alone(tmp_path: Path) -> None:
    """The error is the home's own, the gradient is dropped, and what follows has the bits of a clean start."""
    poisoned = forward_backward(1, seed=1, loss="importance_sampling", **BIG)
    packed = poisoned.forward_backward.batch.packed
    del packed.columns["weights"]
    total = columns(1, **BIG)["tokens"].size
    logprobs, advantages = np.full(total, -5.0, np.float32), np.ones(total, np.float32)
    logprobs[total // 2] = -1e4
    packed.columns["logprobs"].CopyFrom(tensor_from_numpy(logprobs))
    packed.columns["advantages"].CopyFrom(tensor_from_numpy(advantages))
    clean = [forward_backward(3, seed=2, **BIG), optim_step(4)]
    seen = []
    for count in (1, 3):
        async with trainers(tmp_path / str(count), count) as (home, *_):
            run = await home.new_run(rank=4)
            async with home.stream(run) as stream:
                await stream.send(poisoned, optim_step(2), *clean)
                results = await stream.results(4)
        assert [result.error.reason for result in results] == ["NAN_GRADIENT", "DEPENDENCY_FAILED", "", ""]
        seen.append((results[0].error.message, results[3].optim_step.metrics["grad_norm:mean"]))
    assert seen[0] == seen[1]


async def test_a_helpers_own_tenants_keep_their_share(tmp_path: Path) -> None:
    """While a helper's own tenant has work waiting, guests get no more of the passes than one tenant may."""
    own = {"rows": 2, "length": 500}
    async with trainers(tmp_path, 2, max_tokens_per_pass=2048) as (home, helper):
        mine, theirs = await helper.new_run("light"), await home.new_run("acme")
        async with helper.stream(mine, "light") as light, home.stream(theirs) as heavy:
            # The run is claimed before its turn comes.
            await light.send(forward_backward(1, **own))
            await light.results(1)
            await heavy.send(*(forward_backward(seq, seed=seq, **BIG) for seq in range(1, 9)))
            while not any(theirs in one for one in await tokens_of(helper)):
                await asyncio.sleep(0.02)
            before = len(await tokens_of(helper))
            await light.send(*(forward_backward(seq, seed=seq, **own) for seq in range(2, 12)))
            await light.results(10)
            passes = (await tokens_of(helper))[before:]
            await heavy.results(8)
    both = passes[: max(number for number, one in enumerate(passes, 1) if mine in one)]
    first = next(number for number, one in enumerate(both) if mine in one)
    guests, owned = (sum(one.get(run, 0) for one in both[first:]) for run in (theirs, mine))
    assert guests <= owned + 2048


async def tokens_of(bench: Bench) -> list[dict[str, int]]:
    """Returns the positions by run of each pass of a trainer."""
    return [{share.run: share.num_tokens for share in one.shares} for one in await bench.passes()]


async def test_tenants_may_not_lend(tmp_path: Path) -> None:
    """The call is for the services of a deployment; what they must not send is refused."""
    async with trainers(tmp_path, 1) as (one,):

        async def send(tenant: str, *frames: trainer_pb2.ComputeChunksRequest) -> str:
            metadata = metadata_of(tenant) if tenant else one.internal
            call = one.control.ComputeChunks(iter(frames), metadata=metadata, timeout=20)
            error = await refused(lambda: drain(call))
            return from_rpc_error(error).reason

        async def drain(call: AsyncIterator[object]) -> None:
            async for _ in call:
                pass

        hello = trainer_pb2.ComputeChunksRequest(
            hello=trainer_pb2.LendHello(run="tenants/acme/runs/r-1", base="treadle/pip")
        )
        elsewhere = trainer_pb2.ComputeChunksRequest(
            hello=trainer_pb2.LendHello(run="tenants/acme/runs/r-1", base="treadle/other")
        )
        early = trainer_pb2.ComputeChunksRequest(chunk=trainer_pb2.LentChunk(id=1, lengths=b"\x01\0\0\0"))
        damaged = trainer_pb2.ComputeChunksRequest(piece=trainer_pb2.FloatPiece(crc32c=1, data=b"abcd"))
        huge = trainer_pb2.ComputeChunksRequest(weights=trainer_pb2.LendWeights(num_bytes=2**40))
        assert await send("acme", hello) == "PERMISSION_DENIED"
        assert await send("", early) == "BAD_FRAME"
        assert await send("", elsewhere) == "NO_WORKER"
        assert await send("", hello, early) == "BAD_FRAME"
        assert await send("", hello, damaged) == "CHECKSUM_MISMATCH"
        assert await send("", hello, huge) == "BAD_FRAME"
