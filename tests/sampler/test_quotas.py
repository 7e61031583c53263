"""Quotas in the sampler: what was computed is charged, and who has used up his tokens waits."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
import pytest_asyncio

from tests.sampler.conftest import make_prompt
from tests.sampler.harness import TOKEN, Bench, as_tenant, ask, serving
from treadle.errors import TreadleError
from treadle.v1 import admin_pb2, admin_pb2_grpc, sampling_pb2
from treadle.wire import encode_tokens
from treadle_engine.decode_base import DecodeBase
from treadle_engine.lora import AdapterWeights
from treadle_service.channels import internal_metadata
from treadle_service.principal import Principal

ADMIN = internal_metadata(TOKEN, Principal("admin", frozenset({"admin"})))


@pytest_asyncio.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    """A running store and sampler."""
    async with serving(tmp_path) as running:
        yield running


def admin_of(bench: Bench) -> admin_pb2_grpc.AdminServiceStub:
    return admin_pb2_grpc.AdminServiceStub(bench.store_channel)


async def set_quota(bench: Bench, **limits: int) -> None:
    """Makes the tenant `acme` with a quota."""
    admin = admin_of(bench)
    await admin.CreateTenant(admin_pb2.CreateTenantRequest(tenant="acme"), metadata=ADMIN)
    request = admin_pb2.SetQuotaRequest(tenant="acme", quota=admin_pb2.Quota(**limits))
    await admin.SetQuota(request, metadata=ADMIN)


async def usage(bench: Bench, num_tokens: int) -> admin_pb2.GetUsageResponse:
    """Returns the use of `acme` once so many tokens were reported."""
    while True:
        used = await admin_of(bench).GetUsage(admin_pb2.GetUsageRequest(tenant="acme"), metadata=ADMIN)
        if used.total.prompt_tokens + used.total.sampled_tokens >= num_tokens:
            return used
        await asyncio.sleep(0.05)


async def test_use_is_reported_by_model(bench: Bench, base: DecodeBase, adapters: list[AdapterWeights]) -> None:
    """Prompts once per request, drawn tokens per sample; scoring counts as a prompt."""
    model = await bench.publish(base, adapters[0], "one")
    await asyncio.gather(bench.sample(ask(model, num_samples=3)), bench.sample(ask()))
    scored = sampling_pb2.ComputeLogprobsRequest(model=ask().model, tokens=encode_tokens(make_prompt(9)))
    await bench.sampling.ComputeLogprobs(scored, metadata=as_tenant("acme"))
    used = await usage(bench, 12 + 24 + 12 + 8 + 9)
    by_run = {part.run: part.usage for part in used.runs}
    run = model.partition("/revisions/")[0]
    assert (by_run[run].num_operations, by_run[run].prompt_tokens, by_run[run].sampled_tokens) == (1, 12, 24)
    assert (by_run[""].num_operations, by_run[""].prompt_tokens, by_run[""].sampled_tokens) == (2, 21, 8)
    assert used.total.device_time.ToMicroseconds() > 0


async def test_a_request_that_is_given_up_is_charged_for_what_was_drawn(bench: Bench) -> None:
    """Otherwise leaving before the last token would be free."""
    request = sampling_pb2.StreamSampleRequest(request=ask(max_tokens=400))
    call = bench.sampling.StreamSample(request, metadata=as_tenant("acme"))
    for _ in range(5):
        await call.read()
    call.cancel()
    used = await usage(bench, 17)
    assert used.total.prompt_tokens == 12
    assert 5 <= used.total.sampled_tokens < 400


async def test_over_the_quota_a_request_is_told_when_to_come_again(bench: Bench) -> None:
    """Others are not concerned; a raised quota is in force within seconds."""
    await set_quota(bench, sampling_tokens_per_minute=10)
    await bench.sample(ask())
    with pytest.raises(TreadleError) as caught:
        await bench.sample(ask())
    error = caught.value
    assert (error.code, error.reason, error.retryable) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "RATE_LIMITED", True)
    assert 0 < (error.retry_after_seconds or 0) <= 30
    await bench.sample(ask(), "other")
    raised = admin_pb2.SetQuotaRequest(tenant="acme", quota=admin_pb2.Quota(sampling_tokens_per_minute=10**9))
    await admin_of(bench).SetQuota(raised, metadata=ADMIN)
    while await bench.refusal(ask()) == "RATE_LIMITED":
        await asyncio.sleep(0.05)


async def test_requests_at_once_are_bounded_per_tenant(bench: Bench) -> None:
    """What a request may draw counts as used while it runs, so a burst does not run far over either."""
    await set_quota(bench, max_unfinished_operations=2)
    running = [bench.sampling.StreamSample(long_request(), metadata=as_tenant("acme")) for _ in range(2)]
    for call in running:
        await call.read()
    assert await bench.refusal(ask()) == "RATE_LIMITED"
    await bench.sample(ask(), "other")
    for call in running:
        call.cancel()
    while await bench.refusal(ask()) == "RATE_LIMITED":
        await asyncio.sleep(0.05)


def long_request() -> sampling_pb2.StreamSampleRequest:
    return sampling_pb2.StreamSampleRequest(request=ask(max_tokens=480))
