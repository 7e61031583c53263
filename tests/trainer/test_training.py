"""Operations through a real trainer: their numbers, their company, their order."""

import asyncio

import numpy as np
import pytest

from tests.trainer.harness import (
    Bench,
    batch,
    columns,
    forward_backward,
    metadata_of,
    optim_step,
    refused,
    steps,
)
from treadle.errors import from_rpc_error
from treadle.v1 import training_pb2, types_pb2
from treadle.wire import decode_outputs
from treadle_engine import bases
from treadle_engine.base_model import BaseModel
from treadle_engine.batch import TokenBatch
from treadle_engine.lora import AdapterWeights, LoraConfig
from treadle_engine.losses import LossSpec
from treadle_engine.optim import AdamParams, TrainState
from treadle_engine.optim import optim_step as engine_step
from treadle_engine.passes import Chunk, TrainingEngine


def engine_alone(count: int) -> tuple[list[float], list[float], np.ndarray]:
    """Returns losses, gradient norms and the last log-probs of the engine called directly with steps(count)."""
    base = BaseModel.load(str(bases.pip_folder()), dtype="float32")
    engine = TrainingEngine(base)
    state = TrainState.fresh(AdapterWeights.init(base, LoraConfig(rank=8, alpha=32, seed=1)))
    losses, norms, logprobs = [], [], np.zeros(0, np.float32)
    for step in range(count):
        data = columns(1 + 2 * step)
        tokens = TokenBatch(data["lengths"], data["tokens"], data["targets"], {"weights": data["weights"]})
        (result,) = engine.run_pass([Chunk(state, tokens, LossSpec("cross_entropy"))])
        losses.append(result.loss_sum)
        logprobs = result.logprobs_TK
        norms.append(engine_step(state, AdamParams(learning_rate=1e-2, eps=1e-8))["grad_norm:mean"])
    return losses, norms, logprobs


def losses_of(results: list[training_pb2.OperationResult]) -> list[float]:
    return [
        result.forward_backward.outputs.metrics["loss:sum"] for result in results if result.HasField("forward_backward")
    ]


async def test_the_service_gives_the_engines_numbers_bit_for_bit(bench: Bench) -> None:
    """Losses, gradient norms and log-probabilities equal those of the engine called directly."""
    run = await bench.new_run()
    async with bench.stream(run) as stream:
        await stream.send(*steps(4))
        results = await stream.results(8)
    assert [result.seq for result in results] == list(range(1, 9))
    losses, norms, logprobs = engine_alone(4)
    assert losses_of(results) == losses
    assert [result.optim_step.metrics["grad_norm:mean"] for result in results[1::2]] == norms
    assert [result.optim_step.step for result in results[1::2]] == [1, 2, 3, 4]
    served, _ = decode_outputs(results[6].forward_backward.outputs)
    assert np.array_equal(np.concatenate(served), logprobs)


async def test_two_runs_share_passes_and_nothing_else(bench: Bench) -> None:
    """Merged or alone, a run's numbers are the same, and the trace shows that they were merged."""
    alone = await bench.new_run("acme")
    async with bench.stream(alone) as stream:
        await stream.send(*steps(8))
        expected = losses_of(await stream.results(16))
    runs = [await bench.new_run("acme"), await bench.new_run("other")]
    # Both runs are there before either has work, however busy the machine is.
    async with bench.stream(runs[0]) as first, bench.stream(runs[1], "other") as second:
        await asyncio.gather(*(stream.send(*steps(8)) for stream in (first, second)))
        for stream in (first, second):
            assert losses_of(await stream.results(16)) == expected
    shared = [item for item in await bench.passes() if len(item.shares) == 2]
    assert shared
    assert {share.run for share in shared[0].shares} == set(runs)


async def test_a_stream_resumes_where_the_last_one_broke_off(bench: Bench) -> None:
    """The queue runs on without its client; results wait until they are acknowledged."""
    run = await bench.new_run()
    async with bench.stream(run) as stream:
        await stream.send(*steps(3))
        await stream.results(1)
    async with bench.stream(run, acked_seq=1) as stream:
        assert stream.welcome.next_seq == 7
        assert stream.welcome.max_context > 0
        results = await stream.results(5)
        assert [result.seq for result in results] == [2, 3, 4, 5, 6]
        await stream.write(ack=training_pb2.Ack(acked_seq=6))
        await stream.send(*steps(1, first_seq=7))
        await stream.results(2)
    async with bench.stream(run) as stream:
        results = await stream.results(2)
        assert [(result.seq, result.replayed) for result in results] == [(7, True), (8, True)]


async def test_goodbye_is_answered_and_ends_the_stream(bench: Bench) -> None:
    """The only clean end."""
    run = await bench.new_run()
    async with bench.stream(run) as stream:
        await stream.send(*steps(1))
        await stream.results(2)
        await stream.write(goodbye=training_pb2.Goodbye(last_seq=2))
        frame = await stream.read()
        while not frame.HasField("goodbye"):
            frame = await stream.read()
        assert frame.goodbye.last_seq == 2
        assert (await stream.call.code()).name == "OK"


async def test_two_streams_on_one_run_both_get_all_results(bench: Bench) -> None:
    """A second stream sees operations that were sent on the first."""
    run = await bench.new_run()
    async with bench.stream(run) as first, bench.stream(run) as second:
        await first.send(*steps(2))
        results = await asyncio.gather(first.results(4), second.results(4))
    assert [[result.seq for result in each] for each in results] == [[1, 2, 3, 4]] * 2


async def test_a_repeat_runs_once_and_other_content_is_refused(bench: Bench) -> None:
    """SEQ_REUSED and SEQ_GAP end the stream; a new one goes on."""
    run = await bench.new_run()
    async with bench.stream(run) as stream:
        await stream.send(forward_backward(1), forward_backward(1), optim_step(2))
        assert [result.seq for result in await stream.results(2)] == [1, 2]
        await stream.send(forward_backward(1, seed=99))
        error = from_rpc_error(await refused(lambda: stream.results(1)))
        assert error.reason == "SEQ_REUSED"
    async with bench.stream(run, acked_seq=2) as stream:
        await stream.send(optim_step(4))
        error = from_rpc_error(await refused(lambda: stream.results(1)))
        assert error.reason == "SEQ_GAP"
        assert "expects seq 3" in error.message
    async with bench.stream(run, acked_seq=2) as stream:
        await stream.send(optim_step(3))
        assert (await stream.results(1))[0].optim_step.step == 2


async def test_unary_calls_share_the_order_with_streams(bench: Bench) -> None:
    """Submit and wait, also out of order; a repeat says so."""
    run = await bench.new_run()
    later = asyncio.create_task(bench.submit(run, optim_step(2)))
    await asyncio.sleep(0.05)
    assert not await bench.submit(run, forward_backward(1, seed=1))
    assert not await later
    assert await bench.submit(run, forward_backward(1, seed=1))
    assert (await bench.wait(run, 2)).optim_step.step == 1
    async with bench.stream(run, acked_seq=2) as stream:
        assert stream.welcome.next_seq == 3
    request = training_pb2.WaitOperationRequest(run=run, seq=9)
    error = await refused(bench.training.WaitOperation(request, metadata=metadata_of("acme"), timeout=5))
    assert from_rpc_error(error).reason == "OPERATION_NOT_FOUND"


async def test_a_readable_batch_is_answered_readably(bench: Bench) -> None:
    """Lists in, lists out, and the same numbers as packed."""
    run = await bench.new_run()
    data = columns(5)
    listed = types_pb2.Batch()
    start = 0
    for length in data["lengths"].tolist():
        datum = listed.list.data.add(
            tokens=data["tokens"][start : start + length], target_tokens=data["targets"][start : start + length]
        )
        datum.loss_fn_inputs["weights"].values.extend([1.0] * length)
        start += length
    loss = training_pb2.LossFn(name="cross_entropy")
    async with bench.stream(run) as stream:
        for seq, form in enumerate((listed, batch(5)), 1):
            body = training_pb2.Forward(batch=form, loss_fn=loss)
            await stream.send(training_pb2.Operation(seq=seq, forward=body))
        lists, packed = await stream.results(2)
    assert [len(row.values) for row in lists.forward.outputs.logprobs_list] == data["lengths"].tolist()
    for one, other in zip(
        decode_outputs(lists.forward.outputs)[0], decode_outputs(packed.forward.outputs)[0], strict=True
    ):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("tenant", ["other", ""])
async def test_another_tenants_run_is_not_found(bench: Bench, tenant: str) -> None:
    """Not yours and not there are one answer."""
    run = await bench.new_run("acme")

    async def connect(name: str) -> None:
        async with bench.stream(name, tenant):
            pass

    reasons = [
        from_rpc_error(await refused(connect(name))).reason for name in (run, f"tenants/{tenant or 'x'}/runs/r-no")
    ]
    assert reasons == ["RUN_NOT_FOUND", "RUN_NOT_FOUND"]
