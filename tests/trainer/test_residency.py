"""Where states are when there are more runs than memory, and what runs beside passes."""

import asyncio
from pathlib import Path

import pytest
import torch

from tests.trainer.harness import Bench, forward_backward, optim_step, refused, serving, steps
from treadle.errors import from_rpc_error
from treadle.internal.v1 import trainer_pb2
from treadle.v1 import training_pb2
from treadle_engine import bases
from treadle_engine.base_model import BaseModel
from treadle_engine.lora import LoraConfig
from treadle_engine.spare_buffers import SpareBuffers
from treadle_trainer.budget import PassBudget
from treadle_trainer.device import Device

RANK = 4


async def step_once(bench: Bench, run: str, first_seq: int) -> tuple[float, float]:
    """Runs one step on a stream of its own and returns loss and gradient norm."""
    async with bench.stream(run, acked_seq=first_seq - 1) as stream:
        await stream.send(forward_backward(first_seq, seed=first_seq), optim_step(first_seq + 1))
        batch, step = await stream.results(2)
        await stream.write(ack=training_pb2.Ack(acked_seq=first_seq + 1))
    return batch.forward_backward.outputs.metrics["loss:sum"], step.optim_step.metrics["grad_norm:mean"]


async def in_memory(bench: Bench) -> list[str]:
    """Returns the runs whose states are in memory."""
    request = trainer_pb2.GetTrainerStatusRequest()
    return list((await bench.control.GetTrainerStatus(request, metadata=bench.internal, timeout=10)).resident_runs)


def state_bytes(rank: int) -> int:
    """Returns the memory of one run on Pip."""
    base = BaseModel.load(str(bases.pip_folder()), dtype="float32")
    return Device(base, PassBudget(4096)).num_bytes(LoraConfig(rank=rank))


async def test_hundreds_of_runs_share_memory_for_fifty(tmp_path: Path) -> None:
    """Runs leave memory for the store and come back with the bits that they had."""
    count = 300
    async with serving(tmp_path, max_resident_bytes=50 * state_bytes(RANK)) as bench:
        runs = [await bench.new_run(rank=RANK) for _ in range(count)]
        first = [await step_once(bench, run, 1) for run in runs]
        assert len(await in_memory(bench)) <= 50
        stayed = [await step_once(bench, runs[-1], seq) for seq in (3, 5)]
        # The oldest runs have left; those between have not been asked since either.
        returned = [[await step_once(bench, runs[index], seq) for seq in (3, 5)] for index in (0, 1, 77, 150, 249)]
        assert len(await in_memory(bench)) <= 50
    assert len(set(first)) == 1
    assert all(numbers == stayed for numbers in returned)


@pytest.mark.parametrize("place", ["sent", "shared"])
async def test_open_streams_survive_that_their_runs_leave_memory(tmp_path: Path, place: str) -> None:
    """A client whose run was sent away, over the network or by file, sees nothing but its results, in order."""
    shared = tmp_path / "blobs" if place == "shared" else None
    async with serving(tmp_path, max_resident_bytes=3 * state_bytes(RANK), shared_blobs=shared) as bench:
        runs = [await bench.new_run(rank=RANK) for _ in range(8)]
        streams = [bench.stream(run) for run in runs]
        losses: list[list[float]] = [[] for _ in runs]
        for stream in streams:
            await stream.__aenter__()
        for step in range(3):
            for index, stream in enumerate(streams):
                await stream.send(*steps(1, first_seq=1 + 2 * step))
                batch, _ = await stream.results(2)
                losses[index].append(batch.forward_backward.outputs.metrics["loss:sum"])
        assert len(await in_memory(bench)) <= 3
        for stream in streams:
            await stream.__aexit__()
    assert all(each == losses[0] for each in losses)
    assert len(set(losses[0])) == 3


@pytest.mark.parametrize("place", ["sent", "shared"])
async def test_a_damaged_snapshot_is_refused(tmp_path: Path, place: str) -> None:
    """Bits that changed on the disk never become a run's weights."""
    shared = tmp_path / "blobs" if place == "shared" else None
    async with serving(tmp_path, shared_blobs=shared) as bench:
        run = await bench.new_run(rank=RANK)
        async with bench.stream(run) as stream:
            await stream.send(*steps(2))
            await stream.results(4)
        await bench.control.EvictRun(trainer_pb2.EvictRunRequest(run=run), metadata=bench.internal, timeout=20)
        (snapshot,) = [file for file in (tmp_path / "blobs").rglob("*") if file.is_file() and file.name != "lock"]
        content = bytearray(snapshot.read_bytes())
        content[len(content) // 2] ^= 1
        snapshot.write_bytes(content)
        error = await refused(bench.submit(run, forward_backward(5)))
        assert from_rpc_error(error).reason == "CHECKSUM_MISMATCH"
        content[len(content) // 2] ^= 1
        snapshot.write_bytes(content)
        await bench.submit(run, forward_backward(5))


def test_spare_gradients_are_taken_by_length_and_bounded() -> None:
    """A returning run gets a buffer of its own length; the oldest go when there are too many bytes."""
    spare = SpareBuffers(most_bytes=4 * 300)
    for length in (100, 200, 100):
        spare.put(torch.zeros(length))
    assert spare.take(150) is None
    taken = [spare.take(length) for length in (100, 100, 200)]
    assert [None if buffer is None else buffer.numel() for buffer in taken] == [100, None, 200]


async def test_an_idle_run_is_parked_and_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    """Giving up gradient and compute copy changes no number; a pending gradient is kept."""
    async with serving(tmp_path, park_seconds=0.01) as bench:
        parked, busy = await bench.new_run(), await bench.new_run()
        async with bench.stream(busy) as stream:
            await stream.send(*steps(3))
            expected = [result.SerializeToString() for result in await numbers(stream.results(6))]
        found = []
        async with bench.stream(parked) as stream:
            for operation in steps(3):
                await stream.send(operation)
                found += [result.SerializeToString() for result in await numbers(stream.results(1))]
                # Longer than the housekeeping takes to come round.
                await asyncio.sleep(1.2)
    assert found == expected


async def test_steps_run_beside_passes_of_other_runs(tmp_path: Path) -> None:
    """The trace shows passes that went on while optimizer steps of other runs were under way."""
    async with serving(tmp_path) as bench:
        large, small = await bench.new_run(rank=256), await bench.new_run("other", rank=RANK)

        async def train(tenant: str, run: str, count: int) -> list[training_pb2.OperationResult]:
            async with bench.stream(run, tenant) as stream:
                found = []
                for step in range(count):
                    await stream.send(*steps(1, first_seq=1 + 2 * step))
                    if step >= 6:
                        found += await stream.results(2)
                return found + await stream.results(2 * min(count, 6))

        await asyncio.gather(train("acme", large, 12), train("other", small, 40))
        passes = await bench.passes()
    assert any(item.num_steps_beside for item in passes)
    # A run whose step is under way has no part in a pass: its operations end in order.
    assert all(len(share.seqs) == 1 for item in passes for share in item.shares if share.run == large)


async def numbers(results) -> list[training_pb2.OperationResult]:  # type: ignore[no-untyped-def]
    """Returns results without their times."""
    found = await results
    for result in found:
        result.ClearField("queued")
        result.ClearField("ran")
    return list(found)
