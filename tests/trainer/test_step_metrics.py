"""The metrics that are recorded with optimizer steps: sums over a step's batches, whoever computed them."""

from pathlib import Path

from tests.trainer.harness import (
    Bench,
    columns,
    forward_backward,
    metadata_of,
    optim_step,
    serving_store,
    serving_trainer,
)
from treadle.v1 import metrics_pb2, metrics_pb2_grpc, training_pb2
from treadle_service.channels import open_channel


async def recorded(bench: Bench, run: str) -> list[metrics_pb2.MetricPoint]:
    """Returns the run's points once all that was answered is in the journal."""
    async with open_channel(bench.store_address) as channel:
        stub = metrics_pb2_grpc.MetricsServiceStub(channel)
        request = metrics_pb2.ListMetricsRequest(run=run)
        return list((await stub.ListMetrics(request, metadata=metadata_of("acme"))).points)


async def flushed(bench: Bench, run: str, first_seq: int) -> int:
    """Waits until all results up to now are durable: a failure is answered only then. Returns the next seq."""
    await bench.submit(run, training_pb2.Operation(seq=first_seq))
    assert (await bench.wait(run, first_seq)).error.reason == "BAD_OPERATION"
    return first_seq + 1


def sums(results: list[training_pb2.OperationResult], seeds: list[int]) -> tuple[float, float, float]:
    """Returns loss, targets and positions of some forward_backwards."""
    found = [result.forward_backward.outputs.metrics for result in results]
    positions = sum(len(columns(seed)["tokens"]) for seed in seeds)
    return sum(m["loss:sum"] for m in found), sum(m["num_targets:sum"] for m in found), positions


def shown(point: metrics_pb2.MetricPoint) -> tuple[float, float, float]:
    return point.values["loss:sum"], point.values["num_targets:sum"], point.values["num_tokens:sum"]


async def test_a_step_sums_its_batches_and_forgets_those_that_were_dropped(tmp_path: Path) -> None:
    """A step that fails is none; what was computed by two trainers is recorded once and whole."""
    async with serving_store(tmp_path) as store:
        async with serving_trainer(store.address, worker="trainer-0") as first:
            run = await first.new_run()
            async with first.stream(run) as stream:
                await stream.send(forward_backward(1, seed=1), forward_backward(2, seed=2), optim_step(3))
                one = await stream.results(3)
                # The batch behind seed 4 fails, so this step does, and takes nothing along into the next.
                await stream.send(forward_backward(4, seed=3), forward_backward(5, loss="hinge"), optim_step(6))
                assert [bool(result.error.reason) for result in await stream.results(3)] == [False, True, True]
                await stream.send(forward_backward(7, seed=4))
                two = await stream.results(1)
            points = await recorded(first, run)
            assert [point.step for point in points] == [1]
            assert shown(points[0]) == sums(one[:2], [1, 2])
            optim = one[2].optim_step.metrics
            assert {name: points[0].values[name] for name in optim} == dict(optim)
            assert points[0].values["device_seconds:sum"] > 0
        # The batch of seq 7 is computed again here: its gradient was never in a snapshot.
        async with serving_trainer(store.address, worker="trainer-1") as second:
            async with second.stream(run, acked_seq=7) as stream:
                await stream.send(forward_backward(8, seed=5), optim_step(9, learning_rate=0.5))
                two += await stream.results(2)
            await flushed(second, run, 10)
            points = await recorded(second, run)
            assert [point.step for point in points] == [1, 2]
            assert shown(points[1]) == sums(two[:2], [4, 5])
            assert points[1].values["learning_rate:mean"] == 0.5
