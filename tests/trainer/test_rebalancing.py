"""Two trainers over one store: runs go to the one that has less to do, and nobody's numbers change."""

import asyncio
from pathlib import Path

import grpc
import pytest

from tests.trainer.harness import Bench, metadata_of, refused, serving, serving_store, serving_trainer, steps
from tests.trainer.test_recovery import Results, content, eventful, numbers, published, pump, undisturbed
from treadle.errors import from_rpc_error
from treadle.internal.v1 import journal_pb2, trainer_pb2

SOON = {"rebalance_seconds": 0.1, "rebalance_stay_seconds": 0.0, "lease_seconds": 1.5}


async def holder_of(bench: Bench, run: str) -> str:
    request = journal_pb2.LookupRunRequest(run=run)
    return str((await bench.journal.LookupRun(request, metadata=bench.internal, timeout=5)).lease.holder)


async def go_on(benches: dict[str, Bench], run: str, operations: list, found: Results) -> None:
    """Does what a gateway and a client do: connects to the run's holder until all results are there."""
    while max(found, default=0) < operations[-1].seq:
        bench = benches[await holder_of(benches["trainer-0"], run) or "trainer-0"]
        try:
            await pump(bench, run, operations, found)
        except grpc.aio.AioRpcError as error:
            if from_rpc_error(error).reason not in ("WORKER_LOST", "DRAINING", "LEASE_HELD"):
                raise


def offer(run: str, **changes: object) -> trainer_pb2.OfferRunRequest:
    return trainer_pb2.OfferRunRequest(**{"run": run, "base": "treadle/pip", "demand": 1.0, "load": 2.0, **changes})


async def test_half_of_the_runs_move_to_a_trainer_that_joins(tmp_path: Path) -> None:
    """Four that queue ahead on one: two are handed over while they work, and see what undisturbed ones see."""
    operations = eventful(30)
    expected, weights = await undisturbed(tmp_path / "calm", operations)
    async with (
        serving_store(tmp_path / "store") as store,
        serving_trainer(store.address, worker="trainer-0", **SOON) as first,
    ):
        runs = [await first.new_run() for _ in range(4)]
        found: list[Results] = [{} for _ in runs]
        benches = {"trainer-0": first}
        for run, results in zip(runs, found, strict=True):
            await pump(first, run, operations[:3], results)
        async with serving_trainer(store.address, worker="trainer-1", **SOON) as second:
            benches["trainer-1"] = second
            pairs = zip(runs, found, strict=True)
            await asyncio.gather(*(go_on(benches, run, operations, results) for run, results in pairs))
            holders = [await holder_of(first, run) for run in runs]
            assert sorted(holders) == ["trainer-0", "trainer-0", "trainer-1", "trainer-1"]
            gone = next(run for run, holder in zip(runs, holders, strict=True) if holder == "trainer-1")
            # A gateway that has not heard of the move: its caller must not wait until the lease ends.
            error = from_rpc_error(await refused(lambda: first.wait(gone, 1)))
            assert (error.reason, error.retry_after_seconds) == ("LEASE_HELD", 0.1)
            passes = {run for one in await second.passes() for run in (share.run for share in one.shares)}
            assert passes == {run for run, holder in zip(runs, holders, strict=True) if holder == "trainer-1"}
    assert [numbers(results) for results in found] == [expected] * 4
    assert {content(results) for results in found} == {weights}


async def test_an_offer_is_taken_only_if_it_makes_loads_even(tmp_path: Path) -> None:
    """By the taker's own figures, what it has accepted before included."""
    async with serving(tmp_path) as bench:

        async def accepts(request: trainer_pb2.OfferRunRequest) -> bool:
            answer = await bench.control.OfferRun(request, metadata=bench.internal, timeout=5)
            return bool(answer.accepted)

        run = await bench.new_run()
        assert not await accepts(offer(run, base="another"))
        assert not await accepts(offer(run, load=1.0))
        assert not await accepts(offer(run, state_bytes=2**60))
        assert await accepts(offer(run))
        assert not await accepts(offer("tenants/acme/runs/other"))
        await bench.control.TakeRun(trainer_pb2.TakeRunRequest(run=run), metadata=bench.internal, timeout=20)
        assert await holder_of(bench, run) == "trainer-0"
        found: Results = {}
        await pump(bench, run, [*steps(1), published(3)], found)


async def test_trainers_take_nothing_that_is_not_there_and_nothing_where_runs_stay(tmp_path: Path) -> None:
    """RUN_NOT_FOUND for a deleted run; no offer is accepted without rebalancing; and tenants cannot ask."""
    async with serving(tmp_path, rebalance_seconds=0.0) as bench:
        missing = trainer_pb2.TakeRunRequest(run="tenants/acme/runs/none")
        error = await refused(bench.control.TakeRun(missing, metadata=bench.internal, timeout=5))
        assert from_rpc_error(error).reason == "RUN_NOT_FOUND"
        answer = await bench.control.OfferRun(offer("tenants/acme/runs/a"), metadata=bench.internal, timeout=5)
        assert not answer.accepted
        for call in (
            bench.control.OfferRun(offer("tenants/acme/runs/a"), metadata=metadata_of("acme"), timeout=5),
            bench.control.TakeRun(missing, metadata=metadata_of("acme"), timeout=5),
        ):
            assert from_rpc_error(await refused(call)).reason == "PERMISSION_DENIED"


@pytest.mark.parametrize("setting", [{"rebalance_seconds": 0.0}, {"rebalance_stay_seconds": 3600.0}])
async def test_runs_stay_when_settings_say_so(tmp_path: Path, setting: dict[str, float]) -> None:
    """Two runs, an idle trainer beside: nothing moves."""
    async with (
        serving_store(tmp_path) as store,
        serving_trainer(store.address, worker="trainer-0", **{**SOON, **setting}) as first,
        serving_trainer(store.address, worker="trainer-1", **SOON),
    ):
        runs = [await first.new_run() for _ in range(2)]
        for run in runs:
            await pump(first, run, steps(2), {})
        await asyncio.sleep(1.0)
        assert [await holder_of(first, run) for run in runs] == ["trainer-0"] * 2
