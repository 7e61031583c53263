"""Quotas in the trainer: who is over one waits, and is charged once."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import grpc

from tests.trainer.harness import (
    Bench,
    columns,
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
from treadle.internal.v1 import usage_pb2, usage_pb2_grpc
from treadle.v1 import admin_pb2, admin_pb2_grpc, training_pb2
from treadle_service.channels import internal_metadata, open_channel
from treadle_service.principal import Principal
from treadle_trainer import operations

ADMIN = Principal("admin", frozenset({"admin"}))


async def set_quota(bench: Bench, tenant: str = "acme", **limits: int) -> None:
    """Gives a tenant, made if need be, a quota."""
    async with open_channel(bench.store_address) as channel:
        admin = admin_pb2_grpc.AdminServiceStub(channel)
        metadata = internal_metadata(bench.internal[0][1].removeprefix("Bearer "), ADMIN)
        there = await admin.ListTenants(admin_pb2.ListTenantsRequest(), metadata=metadata)
        if tenant not in {known.tenant for known in there.tenants}:
            await admin.CreateTenant(admin_pb2.CreateTenantRequest(tenant=tenant), metadata=metadata)
        request = admin_pb2.SetQuotaRequest(tenant=tenant, quota=admin_pb2.Quota(**limits))
        await admin.SetQuota(request, metadata=metadata)


async def usage(bench: Bench, num_operations: int, tenant: str = "acme") -> admin_pb2.GetUsageResponse:
    """Returns what a tenant has used, once so many operations are recorded: a result is shown a moment earlier."""
    async with open_channel(bench.store_address) as channel:
        metadata = internal_metadata(bench.internal[0][1].removeprefix("Bearer "), ADMIN)
        request = admin_pb2.GetUsageRequest(tenant=tenant)
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        while (used := await stub.GetUsage(request, metadata=metadata)).total.num_operations < num_operations:
            await asyncio.sleep(0.02)
        return used


async def let_in(call: Callable[[], Awaitable[object]]) -> None:
    """Makes a call again and again for as long as it is over a limit."""
    while True:
        try:
            await call()
        except grpc.aio.AioRpcError as error:
            if from_rpc_error(error).reason != "RATE_LIMITED":
                raise
            await asyncio.sleep(0.02)
        else:
            return


def positions(*seeds: int) -> int:
    """Returns how many positions the batches of these seeds have."""
    return sum(int(columns(seed)["lengths"].sum()) for seed in seeds)


def test_an_operations_cost_is_known_before_it_is_decoded() -> None:
    """In both forms of a batch, with shifted targets, and for lengths that are no whole numbers of bytes."""
    operation = forward_backward(1, seed=3)
    assert operations.count_tokens(operation) == positions(3)
    packed = operation.forward_backward.batch.packed
    packed.targets_shifted = True
    assert operations.count_tokens(operation) == positions(3) - 3
    packed.lengths = b"\x05\x00\x00\x00\xff"
    assert operations.count_tokens(operation) == 4
    packed.lengths = b""
    assert operations.count_tokens(operation) == 0
    listed = training_pb2.Operation()
    listed.forward.batch.list.data.add(tokens=[1, 2, 3])
    assert operations.count_tokens(listed) == 3
    assert operations.count_tokens(optim_step(2)) == 0


async def test_usage_is_what_passed_over_the_base(tmp_path: Path) -> None:
    """Positions, operations and device time; an operation that is refused or fails before its pass costs nothing."""
    async with serving(tmp_path) as bench:
        run = await bench.new_run()
        async with bench.stream(run) as stream:
            await stream.send(*steps(2), forward_backward(5, loss="no_such_loss"))
            results = await stream.results(5)
        assert results[4].error.reason == "UNKNOWN_LOSS"
        used = await usage(bench, 5)
        assert [part.run for part in used.runs] == [run]
        assert (used.total.num_operations, used.total.training_tokens) == (5, positions(1, 3))
        assert 0 < used.total.device_time.ToMicroseconds() < 60_000_000
        assert (used.num_runs, used.num_active_runs) == (1, 1)


async def test_over_the_quota_a_stream_ends_once_its_results_are_there(tmp_path: Path) -> None:
    """RATE_LIMITED with the time to wait; a repeat of what was accepted is let in, and charged once."""
    async with serving(tmp_path) as bench:
        await set_quota(bench, training_tokens_per_minute=60)
        run = await bench.new_run()
        async with bench.stream(run) as stream:
            await stream.send(forward_backward(1, seed=1, rows=20), optim_step(2), forward_backward(3))
            assert [result.seq for result in await stream.results(1)] == [1]
            # Credit comes, and nothing else, until the end.
            error = from_rpc_error(await refused(stream.results(1)))
        assert (error.reason, error.retryable) == ("RATE_LIMITED", True)
        assert error.retry_after_seconds == 30.0
        assert "60 training tokens per minute" in error.message
        again = await refused(bench.submit(run, optim_step(2)))
        assert again.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert await bench.submit(run, forward_backward(1, seed=1, rows=20))
        size = int(columns(1, 20)["lengths"].sum())
        assert (await usage(bench, 1)).total.training_tokens == size
        # Another tenant is not concerned, and this one goes on as soon as its quota is raised.
        async with bench.stream(await bench.new_run("other"), "other") as stream:
            await stream.send(*steps(1))
            await stream.results(2)
        await set_quota(bench, training_tokens_per_minute=10**9)
        await let_in(lambda: bench.submit(run, optim_step(2)))
        assert (await bench.wait(run, 2)).optim_step.step == 1


async def test_a_short_overdraft_costs_a_stream_a_moment_only(tmp_path: Path) -> None:
    """It is not read meanwhile; nobody sees an error."""
    async with serving(tmp_path) as bench:
        await set_quota(bench, training_tokens_per_minute=6000)
        run = await bench.new_run()
        async with bench.stream(run) as stream:
            # 100 tokens a second: after the first the tenant owes for a fraction of a second.
            await stream.send(forward_backward(1, rows=550), *steps(1, 2))
            assert [result.seq for result in await stream.results(3)] == [1, 2, 3]


async def test_a_replay_after_a_crash_is_not_charged_again(tmp_path: Path) -> None:
    """What had its result recorded was paid for; what had not is paid for when it has."""
    async with serving_store(tmp_path) as store:
        async with serving_trainer(store.address) as bench:
            await set_quota(bench, training_tokens_per_minute=10**6)
            run = await bench.new_run()
            async with bench.stream(run) as stream:
                await stream.send(*steps(3))
                await stream.results(6)
            first = await usage(bench, 6)
            # Stands in for a crash: the run is claimed anew by a trainer that has not seen it, and replays.
        async with serving_trainer(store.address, worker="trainer-1") as bench:
            assert (await bench.wait(run, 6)).optim_step.step == 3
            async with bench.stream(run, acked_seq=6) as stream:
                await stream.send(*steps(1, 7))
                await stream.results(2)
            second = await usage(bench, 8)
    assert first.total.training_tokens == positions(1, 3, 5)
    assert second.total.training_tokens == positions(1, 3, 5, 7)
    assert second.total.num_operations == 8


async def test_a_tenant_at_its_limit_of_active_runs_gives_up_one_that_nobody_uses(tmp_path: Path) -> None:
    """As long as all are in use a new one waits."""
    async with serving(tmp_path) as bench:
        await set_quota(bench, max_active_runs=1)
        first, second = await bench.new_run(), await bench.new_run()
        async with bench.stream(first) as stream:
            await stream.send(*steps(1))
            await stream.results(2)
            error = from_rpc_error(await refused(bench.submit(second, forward_backward(1))))
            assert (error.reason, error.retry_after_seconds) == ("RATE_LIMITED", 2.0)
        # Until the trainer has noticed that the stream is gone.
        await let_in(lambda: bench.submit(second, forward_backward(1)))
        await bench.wait(second, 1)


async def test_a_full_store_fails_the_save_and_nothing_else(tmp_path: Path) -> None:
    """The error is the operation's; the run trains on."""
    async with serving(tmp_path) as bench:
        await set_quota(bench, max_stored_bytes=1000)
        run = await bench.new_run()
        save = training_pb2.Operation(seq=3, save_weights_for_sampler=training_pb2.SaveWeightsForSampler())
        async with bench.stream(run) as stream:
            await stream.send(*steps(1), save, *steps(1, 4))
            results = await stream.results(5)
        assert (results[2].error.reason, results[2].error.retryable) == ("QUOTA_EXCEEDED", False)
        assert "delete revisions" in results[2].error.message
        assert results[4].optim_step.step == 2


async def test_the_window_of_a_stream_is_no_wider_than_the_quota(tmp_path: Path) -> None:
    """So a client that keeps to its credit is never refused for it; another run of the tenant waits."""
    async with serving(tmp_path) as bench:
        await set_quota(bench, max_unfinished_operations=2)
        run = await bench.new_run()
        async with bench.stream(run) as stream:
            assert stream.welcome.credit.max_seq == 2
            await stream.send(*steps(3))
            assert [result.seq for result in await stream.results(6)] == [1, 2, 3, 4, 5, 6]


async def test_budgets_are_not_for_tenants(tmp_path: Path) -> None:
    """Nor is reporting use."""
    async with serving(tmp_path) as bench, open_channel(bench.store_address) as channel:
        stub = usage_pb2_grpc.UsageServiceStub(channel)
        for call in (
            stub.GetBudgets(usage_pb2.GetBudgetsRequest(), metadata=metadata_of("acme")),
            stub.ReportUsage(usage_pb2.ReportUsageRequest(), metadata=metadata_of("acme")),
        ):
            assert from_rpc_error(await refused(call)).reason == "PERMISSION_DENIED"
