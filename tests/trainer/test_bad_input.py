"""What clients get wrong: each has its reason, and hurts nobody else."""

import numpy as np
import pytest

from tests.trainer.harness import Bench, batch, forward_backward, metadata_of, optim_step, refused, steps
from treadle.errors import from_rpc_error
from treadle.v1 import training_pb2, types_pb2
from treadle.wire import tensor_from_numpy

MIB = 2**20


def changed(seq: int, **columns: np.ndarray) -> training_pb2.Operation:
    """Returns a forward_backward of importance_sampling with some columns replaced."""
    operation = forward_backward(seq, loss="importance_sampling")
    packed = operation.forward_backward.batch.packed
    zeros = tensor_from_numpy(np.zeros(packed.tokens.shape[0], np.float32))
    packed.ClearField("columns")
    for name in ("logprobs", "advantages"):
        packed.columns[name].CopyFrom(zeros)
    for name, column in columns.items():
        packed.columns[name].CopyFrom(tensor_from_numpy(column))
    return operation


def long_row(seq: int, length: int) -> training_pb2.Operation:
    tokens = tensor_from_numpy(np.ones(length, np.int32))
    packed = types_pb2.PackedBatch(lengths=np.array([length], "<u4").tobytes(), tokens=tokens, targets_shifted=True)
    body = training_pb2.ForwardBackward(
        batch=types_pb2.Batch(packed=packed), loss_fn=training_pb2.LossFn(name="cross_entropy")
    )
    return training_pb2.Operation(seq=seq, forward_backward=body)


def out_of_vocabulary(seq: int) -> training_pb2.Operation:
    operation = forward_backward(seq)
    packed = operation.forward_backward.batch.packed
    packed.tokens.CopyFrom(tensor_from_numpy(np.full(packed.tokens.shape[0], 10**6, np.int32)))
    return operation


def nan_advantages(seq: int) -> training_pb2.Operation:
    count = forward_backward(seq).forward_backward.batch.packed.tokens.shape[0]
    return changed(seq, advantages=np.full(count, np.nan, np.float32))


def ragged(seq: int) -> training_pb2.Operation:
    return changed(seq, advantages=np.zeros(3, np.float32))


BAD = {
    # First: behind a failed batch a step would fail for that.
    "BAD_VALUE": lambda seq: optim_step(seq, learning_rate=-1.0),
    "UNKNOWN_LOSS": lambda seq: forward_backward(seq, loss="hinge"),
    "TOKEN_OUT_OF_RANGE": out_of_vocabulary,
    "SEQUENCE_TOO_LONG": lambda seq: long_row(seq, 20_000),
    "BAD_SHAPE": ragged,
    "BAD_OPERATION": lambda seq: training_pb2.Operation(seq=seq),
    "BAD_NAME": lambda seq: training_pb2.Operation(
        seq=seq, save_state=training_pb2.SaveState(checkpoint_id="../../etc")
    ),
    "ADAPTER_NOT_FOUND": lambda seq: training_pb2.Operation(
        seq=seq, load_state=training_pb2.LoadState(adapter="tenants/acme/runs/r-x/revisions/none")
    ),
}


async def test_each_bad_operation_fails_alone_with_its_reason(bench: Bench) -> None:
    """The stream lives on, the other run's numbers do not change, and the run itself is clean after a barrier."""
    victim, quiet = await bench.new_run("acme"), await bench.new_run("other")
    async with bench.stream(victim) as bad, bench.stream(quiet, "other") as good:
        await good.send(*steps(3))
        reasons = []
        for seq, make in enumerate(BAD.values(), 1):
            await bad.send(make(seq))
            reasons.append((await bad.results(1))[0].error.reason)
        assert reasons == list(BAD)
        seq = len(BAD) + 1
        await bad.send(nan_advantages(seq), training_pb2.Operation(seq=seq + 1, barrier=training_pb2.Barrier()))
        nan, barrier = await bad.results(2)
        assert nan.error.reason in ("BAD_BATCH_VALUE", "BAD_VALUE")
        assert "datum 0" in nan.error.message
        assert barrier.barrier.num_failed == len(BAD) + 1
        await bad.send(*steps(1, first_seq=seq + 2))
        fresh = await bad.results(2)
        assert not fresh[1].HasField("error")
        losses = [r.forward_backward.outputs.metrics["loss:sum"] for r in await good.results(6) if r.seq % 2]
    alone = await bench.new_run("third")
    async with bench.stream(alone, "third") as stream:
        await stream.send(*steps(3))
        expected = [r.forward_backward.outputs.metrics["loss:sum"] for r in await stream.results(6) if r.seq % 2]
    assert losses == expected


async def test_exploded_weights_poison_only_their_own_run(bench: Bench) -> None:
    """NaN in one run's pass is that run's error; a run that shares the device keeps its numbers."""
    wild, quiet, alone = await bench.new_run(), await bench.new_run(seed=3), await bench.new_run(seed=3)
    async with bench.stream(wild) as bad, bench.stream(quiet) as good, bench.stream(alone) as reference:
        await bad.send(forward_backward(1), optim_step(2, learning_rate=1e38), forward_backward(3), optim_step(4))
        await good.send(*steps(4))
        spoilt, calm = await bad.results(4), await good.results(8)
        await reference.send(*steps(4))
        expected = await reference.results(8)
    assert [result.error.reason for result in spoilt] == ["", "", "NAN_GRADIENT", "DEPENDENCY_FAILED"]
    for one, other in zip(calm, expected, strict=True):
        assert one.forward_backward.outputs == other.forward_backward.outputs


async def test_a_sequence_that_is_too_long_is_told_both_numbers(bench: Bench) -> None:
    """Its own length and the limit."""
    run = await bench.new_run()
    async with bench.stream(run) as stream:
        await stream.send(long_row(1, 20_000))
        message = (await stream.results(1))[0].error.message
        assert "19999" in message
        assert str(stream.welcome.max_context) in message


async def test_a_datum_of_a_million_tokens_is_refused_and_costs_nobody_anything(bench: Bench) -> None:
    """It comes in fragments, is journaled by its blob, and fails alone: the run's next step and a neighbour go on."""
    run, neighbour = await bench.new_run(), await bench.new_run("other")
    data = long_row(1, 10**6).SerializeToString()
    async with bench.stream(run) as stream, bench.stream(neighbour, "other") as beside:
        await beside.send(*steps(3))
        for start in range(0, len(data), MIB):
            part = training_pb2.OperationFragment(total_bytes=len(data), offset=start, data=data[start : start + MIB])
            await stream.write(fragment=part)
        error = (await stream.results(1))[0].error
        assert "999999" in error.message
        assert str(stream.welcome.max_context) in error.message
        await stream.send(training_pb2.Operation(seq=2, barrier=training_pb2.Barrier()), *steps(1, first_seq=3))
        assert [result.HasField("error") for result in await stream.results(3)] == [False] * 3
        assert [result.HasField("error") for result in await beside.results(6)] == [False] * 6


async def test_a_step_behind_a_bad_batch_names_it(bench: Bench) -> None:
    """DEPENDENCY_FAILED carries the failed seq; the next step works."""
    run = await bench.new_run()
    async with bench.stream(run) as stream:
        await stream.send(forward_backward(1), forward_backward(2, loss="hinge"), optim_step(3), *steps(1, first_seq=4))
        results = await stream.results(5)
    assert [result.error.reason for result in results] == ["", "UNKNOWN_LOSS", "DEPENDENCY_FAILED", "", ""]
    assert results[2].failed_seq == 2
    assert results[4].optim_step.step == 1


async def test_a_long_operation_travels_in_fragments(bench: Bench) -> None:
    """The parts give the same answer as the whole."""
    run = await bench.new_run()
    whole, parted = forward_backward(1, seed=3, rows=40, length=60), forward_backward(2, seed=3, rows=40, length=60)
    data = parted.SerializeToString()
    async with bench.stream(run) as stream:
        await stream.send(whole)
        for start in range(0, len(data), 5000):
            part = training_pb2.OperationFragment(total_bytes=len(data), offset=start, data=data[start : start + 5000])
            await stream.write(fragment=part)
        one, two = await stream.results(2)
    assert one.forward_backward.outputs == two.forward_backward.outputs


async def test_an_operation_above_a_mebibyte_goes_to_a_blob_and_runs(bench: Bench) -> None:
    """Its journal entry names the blob; the result is there like any other."""
    run = await bench.new_run()
    operation = forward_backward(1, seed=3)
    rows = operation.forward_backward.batch.packed.lengths
    operation.forward_backward.batch.packed.row_columns["weights"].CopyFrom(
        tensor_from_numpy(np.ones(len(rows) // 4, np.float32))
    )
    operation.forward_backward.batch.packed.ClearField("columns")
    # Settings that the loss does not know make it long without making it work; it fails after it was journaled.
    operation.forward_backward.loss_fn.config.update({f"{'x' * 1000}{index}": 1.0 for index in range(1200)})
    data = operation.SerializeToString()
    assert len(data) > MIB
    async with bench.stream(run) as stream:
        for start in range(0, len(data), MIB):
            part = training_pb2.OperationFragment(total_bytes=len(data), offset=start, data=data[start : start + MIB])
            await stream.write(fragment=part)
        await stream.send(training_pb2.Operation(seq=2, barrier=training_pb2.Barrier()))
        results = await stream.results(2)
    assert [result.error.reason for result in results] == ["BAD_VALUE", ""]


LIES = {
    "a part that overlaps": [(100, 0, 60), (100, 50, 50)],
    "a part that is too long": [(100, 0, 101)],
    "a total that changes": [(100, 0, 50), (120, 50, 50)],
    "an empty part": [(100, 0, 0)],
}


@pytest.mark.parametrize("parts", LIES.values(), ids=list(LIES))
async def test_a_frame_that_lies_about_its_size_ends_the_stream_only(
    bench: Bench, parts: list[tuple[int, int, int]]
) -> None:
    """FRAME_SIZE_MISMATCH; the next stream works."""
    run = await bench.new_run()
    async with bench.stream(run) as stream:
        for total, offset, length in parts:
            await stream.write(
                fragment=training_pb2.OperationFragment(total_bytes=total, offset=offset, data=b"x" * length)
            )
        assert from_rpc_error(await refused(lambda: stream.results(1))).reason == "FRAME_SIZE_MISMATCH"
    async with bench.stream(run) as stream:
        await stream.send(*steps(1))
        assert len(await stream.results(2)) == 2


async def test_frames_and_operations_have_a_longest_size(bench: Bench) -> None:
    """FRAME_TOO_LARGE, OPERATION_TOO_LARGE, CREDIT_EXCEEDED and BAD_FRAME, each before anything is kept."""
    run = await bench.new_run()
    too_long = training_pb2.Operation(seq=1, barrier=training_pb2.Barrier())
    too_long.forward_backward.loss_fn.name = "x" * (MIB + 5000)
    frames = {
        "FRAME_TOO_LARGE": {"operation": too_long},
        "OPERATION_TOO_LARGE": {"fragment": training_pb2.OperationFragment(total_bytes=33 * MIB, offset=0, data=b"x")},
        "CREDIT_EXCEEDED": {"operation": optim_step(17)},
        "BAD_FRAME": {"hello": training_pb2.Hello(protocol=1, run=run)},
    }
    for reason, frame in frames.items():
        async with bench.stream(run) as stream:
            await stream.write(**frame)
            assert from_rpc_error(await refused(lambda stream=stream: stream.results(1))).reason == reason


async def test_queued_operations_can_be_cancelled_and_time_out(bench: Bench) -> None:
    """Both finish in order with their own reason; the run goes on."""
    run = await bench.new_run()
    waiting = optim_step(3)
    waiting.queue_timeout.FromMilliseconds(1)
    async with bench.stream(run) as stream:
        await stream.send(forward_backward(1, rows=60, length=60), forward_backward(2, loss="hinge"), waiting)
        results = await stream.results(3)
        assert results[2].error.reason in ("QUEUE_TIMEOUT", "DEPENDENCY_FAILED")
        await stream.send(forward_backward(4, rows=60, length=60), optim_step(5), forward_backward(6), optim_step(7))
        request = training_pb2.CancelOperationsRequest(run=run, from_seq=5)
        for _ in range(200):
            answer = await bench.training.CancelOperations(request, metadata=metadata_of("acme"), timeout=20)
            if answer.cancelled_seqs:
                break
        results = await stream.results(4)
        cancelled = list(answer.cancelled_seqs)
        assert [result.seq for result in results if result.error.reason == "CANCELLED"] == cancelled
        await stream.send(training_pb2.Operation(seq=8, barrier=training_pb2.Barrier()))
        assert (await stream.results(1))[0].barrier.num_failed >= 2


async def test_a_forward_needs_no_weights(bench: Bench) -> None:
    """Log-probabilities alone can be asked for."""
    run = await bench.new_run()
    bare = batch(1)
    bare.packed.ClearField("columns")
    body = training_pb2.Forward(batch=bare, loss_fn=training_pb2.LossFn(name="cross_entropy"))
    async with bench.stream(run) as stream:
        await stream.send(training_pb2.Operation(seq=1, forward=body))
        result = (await stream.results(1))[0]
    assert result.forward.outputs.metrics["loss:sum"] == 0.0
