"""What survives a trainer: its runs go on, with the same numbers, on whoever claims them."""

import asyncio
import random
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from tests.trainer.harness import (
    TOKEN,
    Bench,
    forward_backward,
    metadata_of,
    optim_step,
    refused,
    serving,
    serving_store,
    serving_trainer,
    steps,
)
from treadle.errors import from_rpc_error
from treadle.internal.v1 import journal_pb2, trainer_pb2
from treadle.v1 import training_pb2

Results = dict[int, training_pb2.OperationResult]


def published(seq: int) -> training_pb2.Operation:
    return training_pb2.Operation(seq=seq, save_weights_for_sampler=training_pb2.SaveWeightsForSampler())


def numbers(results: Results) -> list[tuple[int, str, float, float]]:
    """Returns what must be the same whatever happened: outcome, loss and gradient norm of each operation."""
    return [
        (
            seq,
            result.error.reason,
            result.forward_backward.outputs.metrics["loss:sum"],
            result.optim_step.metrics["grad_norm:mean"],
        )
        for seq, result in sorted(results.items())
    ]


async def pump(bench: Bench, run: str, operations: list[training_pb2.Operation], found: Results) -> None:
    """Sends what the trainer does not have yet and collects results until all are there, on one stream."""
    last = operations[-1].seq
    acked = max(found, default=0)
    async with bench.stream(run, acked_seq=acked) as stream:
        sent = stream.welcome.next_seq
        credit = stream.welcome.credit.max_seq
        while max(found, default=0) < last:
            while sent <= min(credit, last):
                await stream.send(operations[sent - 1])
                sent += 1
            frame = await stream.read()
            if frame.HasField("credit"):
                credit = frame.credit.max_seq
            elif frame.HasField("result"):
                assert frame.result.seq == max(found, default=0) + 1
                found[frame.result.seq] = frame.result


def eventful(count: int) -> list[training_pb2.Operation]:
    """Returns steps with two batches each, a failed batch in the middle, and a publication at the end."""
    operations: list[training_pb2.Operation] = []
    for step in range(count):
        seq = 1 + 3 * step
        loss = "hinge" if step == count // 2 else "cross_entropy"
        operations += [
            forward_backward(seq, seed=seq, rows=8, length=40),
            forward_backward(seq + 1, seed=seq + 1, loss=loss),
            optim_step(seq + 2),
        ]
    return [*operations, published(3 * count + 1)]


async def undisturbed(folder: Path, operations: list[training_pb2.Operation]) -> tuple[list[object], str]:
    """Returns the numbers and the published content of a run that nothing happens to."""
    async with serving(folder) as bench:
        run, found = await bench.new_run(), {}
        await pump(bench, run, operations, found)
        return list(numbers(found)), content(found)


def content(found: Results) -> str:
    return found[max(found)].save_weights_for_sampler.revision.rpartition("/")[2]


async def test_a_drained_trainer_hands_its_runs_to_the_next(tmp_path: Path) -> None:
    """The stream hears of it, nothing queued is lost, and another worker need not wait for the lease."""
    operations = eventful(6)
    expected, weights = await undisturbed(tmp_path / "calm", operations)
    found: Results = {}
    async with serving_store(tmp_path / "store") as store:
        async with serving_trainer(store.address, worker="trainer-0") as first:
            run = await first.new_run()
            async with first.stream(run) as stream:
                await stream.send(*operations[:12])
                found |= {result.seq: result for result in await stream.results(4)}
                assert first.host is not None
                draining = asyncio.create_task(first.host.drain())
                error = await refused(lambda: stream.results(99))
                assert from_rpc_error(error).reason == "DRAINING"
                assert stream.drained
                await draining
        async with serving_trainer(store.address, worker="trainer-1") as second:
            await pump(second, run, operations, found)
    assert numbers(found) == expected
    assert content(found) == weights


async def test_a_run_that_leaves_finishes_what_it_has_begun(tmp_path: Path) -> None:
    """An operation of many passes is answered before the trainer lets go of the run; the one behind it is not begun."""
    async with (
        serving_store(tmp_path) as store,
        serving_trainer(store.address, max_tokens_per_pass=1024) as bench,
    ):
        run = await bench.new_run()
        async with bench.stream(run) as stream:
            await stream.send(forward_backward(1, rows=200, length=60), optim_step(2))
            while not await bench.passes():
                await asyncio.sleep(0.002)
            assert bench.host is not None
            draining = asyncio.create_task(bench.host.drain())
            (result,) = await stream.results(1)
            assert stream.drained
            assert not result.HasField("error")
            assert from_rpc_error(await refused(lambda: stream.results(1))).reason == "DRAINING"
            await draining


async def test_an_evicted_run_comes_back_on_demand(tmp_path: Path) -> None:
    """Eviction snapshots, releases and drops; the next stream brings the run back."""
    async with serving(tmp_path) as bench:
        run = await bench.new_run()
        async with bench.stream(run) as stream:
            await stream.send(*steps(2))
            await stream.results(4)
            await bench.control.EvictRun(trainer_pb2.EvictRunRequest(run=run), metadata=bench.internal, timeout=20)
            assert from_rpc_error(await refused(lambda: stream.results(1))).reason == "WORKER_LOST"
        status = await bench.control.GetTrainerStatus(
            trainer_pb2.GetTrainerStatusRequest(), metadata=bench.internal, timeout=5
        )
        assert list(status.resident_runs) == []
        assert status.num_passes == 2
        async with bench.stream(run, acked_seq=4) as stream:
            assert stream.welcome.next_seq == 5
            await stream.send(*steps(1, first_seq=5))
            assert (await stream.results(2))[1].optim_step.step == 3


async def test_the_trainers_own_service_is_not_for_tenants(tmp_path: Path) -> None:
    """A forwarded principal is refused."""
    async with serving(tmp_path) as bench:
        request = trainer_pb2.ListPassesRequest()
        error = await refused(bench.control.ListPasses(request, metadata=metadata_of("acme"), timeout=5))
        assert from_rpc_error(error).reason == "PERMISSION_DENIED"


async def test_a_trainer_whose_lease_was_taken_writes_no_more(tmp_path: Path) -> None:
    """Its next write is refused, its streams end, and what it had computed is computed again by the new holder."""
    operations = eventful(4)
    expected, weights = await undisturbed(tmp_path / "calm", operations)
    found: Results = {}
    async with serving_store(tmp_path / "store") as store, serving_trainer(store.address, lease_seconds=60) as bench:
        run = await bench.new_run()
        async with bench.stream(run) as stream:
            await stream.send(*operations[:4])
            found |= {result.seq: result for result in await stream.results(2)}
            # A restarted worker of the same name takes the lease at once.
            claim = journal_pb2.ClaimRunRequest(run=run, holder="trainer-0", address="x", ttl=Duration(seconds=1))
            await bench.journal.ClaimRun(claim, metadata=bench.internal, timeout=5)
            # By another call: a write on a stream that has just ended would hide why it did.
            with suppress(grpc.aio.AioRpcError):
                await bench.submit(run, operations[4])
            assert from_rpc_error(await refused(lambda: stream.results(99))).reason == "WORKER_LOST"
        found = {seq: result for seq, result in found.items() if seq <= 2}
        await pump(bench, run, operations, found)
    assert numbers(found) == expected
    assert content(found) == weights


async def test_a_replay_that_gives_other_bits_makes_the_run_read_only(tmp_path: Path) -> None:
    """DIVERGED names both digests instead of going on in silence, in results and in the catalog, for ever."""
    async with serving_store(tmp_path) as store:
        async with serving_trainer(store.address) as bench:
            run = await bench.new_run()
            async with bench.stream(run) as stream:
                await stream.send(*steps(3))
                await stream.results(6)
            # As after a crash: the journal has everything, and no snapshot covers it.
            claim = journal_pb2.ClaimRunRequest(run=run, holder="trainer-0", address="x", ttl=Duration(seconds=1))
            await asyncio.sleep(0.5)
            await bench.journal.ClaimRun(claim, metadata=bench.internal, timeout=5)
        with sqlite3.connect(tmp_path / "store.db") as database:
            changed = database.execute("UPDATE results SET state_digest = ? WHERE seq = 4", (b"\x01" * 32,))
            assert changed.rowcount == 1
        database.close()
        for first_seq in (7, 9):
            # The second trainer need not find it again.
            async with serving_trainer(store.address) as bench:
                async with bench.stream(run, acked_seq=first_seq - 1) as stream:
                    await stream.send(*steps(1, first_seq=first_seq))
                    results = await stream.results(2)
                lookup = journal_pb2.LookupRunRequest(run=run)
                shown = (await bench.journal.LookupRun(lookup, metadata=bench.internal, timeout=5)).run
            assert [result.error.reason for result in results] == ["DIVERGED", "DIVERGED"]
            assert "01" * 32 in results[0].error.message
            assert shown.state == training_pb2.RUN_STATE_DIVERGED
            found = shown.divergence
            assert (found.seq, found.recorded_digest, len(found.replayed_digest)) == (4, b"\x01" * 32, 16)
            assert found.message == results[0].error.message


async def test_a_store_that_is_away_for_a_moment_costs_time_only(tmp_path: Path) -> None:
    """Nothing is answered that is not durable; when the store is back, everything is."""
    async with AsyncExitStack() as first_store, AsyncExitStack() as rest:
        store = await first_store.enter_async_context(serving_store(tmp_path))
        bench = await rest.enter_async_context(serving_trainer(store.address, lease_seconds=30))
        run = await bench.new_run()
        stream = await rest.enter_async_context(bench.stream(run))
        await stream.send(*steps(1))
        await stream.results(2)
        await first_store.aclose()
        await stream.send(*steps(2, first_seq=3))
        waiting = asyncio.create_task(stream.results(4))
        await asyncio.wait([waiting], timeout=1.0)
        assert not waiting.done()
        await rest.enter_async_context(serving_store(tmp_path, store.address))
        assert [result.seq for result in await waiting] == [3, 4, 5, 6]
        # The trainer drains before the store goes: leave in the right order.
        stream.call.cancel()
        assert bench.host is not None
        await bench.host.drain()


class TrainerProcess:
    """A trainer in a process of its own, to be killed."""

    def __init__(self, store_address: str, folder: Path) -> None:
        self._store_address, self._folder, self._starts = store_address, folder, 0

    @asynccontextmanager
    async def run(self) -> AsyncIterator[tuple[subprocess.Popen[bytes], Bench]]:
        """Starts it and yields it with a client; kills it in the end."""
        self._starts += 1
        address = self._folder / f"address-{self._starts}"
        flags = {
            "--listen": "127.0.0.1:0",
            "--internal-token": TOKEN,
            "--store-address": self._store_address,
            "--worker": "trainer-0",
            "--base": "pip",
            "--dtype": "float32",
            "--threads": "1",
            "--snapshot-every-steps": "3",
            "--address-file": str(address),
        }
        arguments = [part for flag in flags.items() for part in flag]
        with (self._folder / "trainer.log").open("ab") as log:
            process = subprocess.Popen([sys.executable, "-m", "treadle_trainer", *arguments], stdout=log, stderr=log)
        try:
            while not address.exists() or not address.read_text():
                assert process.poll() is None, (self._folder / "trainer.log").read_text()
                await asyncio.sleep(0.05)
            bench = Bench(self._store_address, address.read_text())
            yield process, bench
            await bench.close()
        finally:
            process.kill()
            process.wait()


async def persist(bench: Bench, run: str, operations: list[training_pb2.Operation], found: Results) -> None:
    """Pumps on new streams while the trainer still loads its base."""
    while True:
        try:
            await pump(bench, run, operations, found)
        except grpc.aio.AioRpcError as error:
            if from_rpc_error(error).reason != "UNAVAILABLE" or "loads its base" not in (error.details() or ""):
                raise
            await asyncio.sleep(0.1)
        else:
            return


@pytest.mark.timeout(180)
async def test_killing_the_trainer_at_any_moment_changes_no_number(tmp_path: Path) -> None:
    """kill -9 twice at random places: each operation takes effect once, and the weights keep their bits."""
    operations = eventful(12)
    expected, weights = await undisturbed(tmp_path / "calm", operations)
    kills = sorted(random.Random(5).sample(range(1, 34), 2))
    found: Results = {}
    async with serving_store(tmp_path / "store") as store:
        trainer, run = TrainerProcess(store.address, tmp_path), ""
        for place in [*kills, None]:
            async with trainer.run() as (process, bench):
                run = run or await bench.new_run()
                pumping = asyncio.create_task(persist(bench, run, operations, found))
                if place is None:
                    await pumping
                    break
                while len(found) < place:
                    assert not pumping.done() or pumping.result() is None
                    await asyncio.sleep(0.001)
                process.send_signal(signal.SIGKILL)
                await asyncio.wait([pumping])
                assert pumping.exception() is not None
    assert numbers(found) == expected
    assert content(found) == weights
