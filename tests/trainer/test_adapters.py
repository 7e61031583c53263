"""Saving and loading through a real store."""

import asyncio
from pathlib import Path

import pytest

from tests.trainer.harness import Bench, forward_backward, metadata_of, optim_step, serving, steps
from treadle.v1 import adapters_pb2, adapters_pb2_grpc, training_pb2
from treadle_service.channels import open_channel


def save(seq: int, name: str = "") -> training_pb2.Operation:
    return training_pb2.Operation(seq=seq, save_state=training_pb2.SaveState(checkpoint_id=name))


def publish(seq: int, name: str = "") -> training_pb2.Operation:
    body = training_pb2.SaveWeightsForSampler(revision_id=name)
    return training_pb2.Operation(seq=seq, save_weights_for_sampler=body)


def load(seq: int, adapter: str, with_optimizer: bool = True) -> training_pb2.Operation:
    body = training_pb2.LoadState(adapter=adapter, with_optimizer=with_optimizer)
    return training_pb2.Operation(seq=seq, load_state=body)


async def test_a_checkpoint_brings_back_the_same_numbers(bench: Bench) -> None:
    """Loaded with its optimizer, a run repeats the step that followed the save, bit for bit."""
    run = await bench.new_run()
    async with bench.stream(run) as stream:
        await stream.send(*steps(2), save(5), forward_backward(6, seed=50), optim_step(7), forward_backward(8, seed=51))
        results = await stream.results(8)
        checkpoint = results[4].save_state.checkpoint
        assert checkpoint == f"{run}/checkpoints/step-2"
        await stream.send(
            load(9, checkpoint), forward_backward(10, seed=50), optim_step(11), forward_backward(12, seed=51)
        )
        again = await stream.results(4)
    assert again[0].load_state.step == 2
    for before, after in zip(results[5:8], again[1:4], strict=True):
        assert before.forward_backward.outputs == after.forward_backward.outputs
        assert dict(before.optim_step.metrics) == dict(after.optim_step.metrics)


async def test_a_shared_folder_changes_no_byte(tmp_path: Path) -> None:
    """Written into the store's folder, a revision is called by the same content as one that was sent."""
    names = []
    for place, shared in (("sent", None), ("shared", tmp_path / "shared" / "blobs")):
        async with serving(tmp_path / place, shared_blobs=shared) as bench:
            run = await bench.new_run()
            async with bench.stream(run) as stream:
                await stream.send(*steps(1), publish(3), load(4, f"{run}/revisions/none", with_optimizer=False))
                results = await stream.results(4)
                revision = results[2].save_weights_for_sampler.revision
                await stream.send(load(5, revision, with_optimizer=False))
                assert not (await stream.results(1))[0].HasField("error")
        names.append(revision.rpartition("/")[2])
    assert names[0] == names[1]
    assert list((tmp_path / "shared" / "blobs" / "incoming").iterdir()) == []


async def test_revisions_that_follow_each_other_are_written_over_a_spare_file(tmp_path: Path) -> None:
    """Announced as they lie there, published with the bytes that a trainer without the folder sends."""
    saves = [*steps(1), publish(3), *steps(1, first_seq=4), publish(6)]
    incoming, names = tmp_path / "shared" / "blobs" / "incoming", []
    for place, shared in (("sent", None), ("shared", tmp_path / "shared" / "blobs")):
        async with serving(tmp_path / place, shared_blobs=shared) as bench:
            run = await bench.new_run()
            async with bench.watch() as news, bench.stream(run) as stream:
                await stream.send(*saves[:3])
                first = (await stream.results(3))[-1]
                async with asyncio.timeout(10):
                    while shared is not None and not list(incoming.iterdir()):
                        await asyncio.sleep(0.01)
                spare = [path.name for path in incoming.iterdir()] if shared is not None else []
                await stream.send(*saves[3:])
                second = (await stream.results(3))[-1]
                heard = [await news.read() for _ in range(2 if shared is None else 4)]
        revisions = [result.save_weights_for_sampler.revision for result in (first, second)]
        assert [event.published.name for event in heard if event.HasField("published")] == revisions
        assert [event.arriving.file for event in heard if event.HasField("arriving")][1:] == spare
        assert all(event.arriving.run == run for event in heard if event.HasField("arriving"))
        names.append([revision.rpartition("/")[2] for revision in revisions])
    assert names[0] == names[1]
    assert list(incoming.iterdir()) == []


async def test_a_new_run_starts_from_a_checkpoint(bench: Bench) -> None:
    """It takes weights, moments and the step count."""
    run = await bench.new_run()
    async with bench.stream(run) as stream:
        await stream.send(*steps(2), save(5, "here"), *steps(1, first_seq=6))
        expected = await stream.results(7)
    child = await bench.new_run(from_adapter=f"{run}/checkpoints/here")
    async with bench.stream(child) as stream:
        data = forward_backward(1, seed=6)
        await stream.send(data, optim_step(2))
        results = await stream.results(2)
    assert results[0].forward_backward.outputs == expected[5].forward_backward.outputs
    assert results[1].optim_step.step == 3
    assert dict(results[1].optim_step.metrics) == dict(expected[6].optim_step.metrics)


async def test_a_revision_is_published_under_its_content_or_its_name(bench: Bench) -> None:
    """Unnamed twice without a step between is the same revision; the store holds its PEFT files."""
    run = await bench.new_run()
    async with bench.stream(run) as stream:
        await stream.send(*steps(1), publish(3), publish(4), publish(5, "final"), publish(6, "final"))
        results = await stream.results(6)
    unnamed = results[2].save_weights_for_sampler.revision
    assert unnamed == results[3].save_weights_for_sampler.revision
    assert unnamed.startswith(f"{run}/revisions/w-")
    assert results[4].save_weights_for_sampler.revision == f"{run}/revisions/final"
    async with open_channel(bench.store_address) as channel:
        adapters = adapters_pb2_grpc.AdapterServiceStub(channel)
        request = adapters_pb2.GetRevisionRequest(name=unnamed)
        found = await adapters.GetRevision(request, metadata=metadata_of("acme"), timeout=5)
    assert [file.path for file in found.revision.files] == ["adapter_config.json", "adapter_model.safetensors"]
    assert found.revision.step == 1


@pytest.mark.parametrize(
    ("rank", "with_optimizer", "reason"), [(4, False, "INCOMPATIBLE_ADAPTER"), (8, True, "NO_OPTIMIZER_STATE")]
)
async def test_what_does_not_fit_is_not_loaded(bench: Bench, rank: int, with_optimizer: bool, reason: str) -> None:
    """Another shape, or a revision where a checkpoint is needed; the run keeps its weights."""
    source, target = await bench.new_run(rank=rank), await bench.new_run(seed=2)
    async with bench.stream(source) as stream:
        await stream.send(publish(1, "one"))
        revision = (await stream.results(1))[0].save_weights_for_sampler.revision
    async with bench.stream(target) as stream:
        await stream.send(forward_backward(1), load(2, revision, with_optimizer), forward_backward(3))
        results = await stream.results(3)
    assert results[1].error.reason == reason
    assert results[0].forward_backward.outputs == results[2].forward_backward.outputs


async def test_another_tenants_adapter_is_not_found(bench: Bench) -> None:
    """Not yours and not there are one answer."""
    source, target = await bench.new_run("other"), await bench.new_run("acme")
    async with bench.stream(source, "other") as stream:
        await stream.send(publish(1, "secret"))
        revision = (await stream.results(1))[0].save_weights_for_sampler.revision
    async with bench.stream(target) as stream:
        await stream.send(load(1, revision, with_optimizer=False))
        assert (await stream.results(1))[0].error.reason == "ADAPTER_NOT_FOUND"
