"""Managed jobs: processes beside the gateway that run a recipe with their owner's key."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.dashboard.conftest import write_rows
from tests.support.cluster import Cluster
from treadle import ServiceClient
from treadle.errors import TreadleError
from treadle_gateway.http.dashboard.door import Viewer
from treadle_gateway.http.dashboard.jobs import Job, Jobs
from treadle_gateway.settings import GatewaySettings
from treadle_service.principal import Principal

SCOPES = frozenset({"train", "sample"})
OPTIONS: dict[str, Any] = {"epochs": 8.0, "batch_size": 4, "rank": 4, "checkpoint_every": 5, "num_samples": 0}


@pytest.fixture
def viewer(cluster: Cluster) -> Viewer:
    key = cluster.new_tenant()
    return Viewer(key, Principal(key.split("_")[1], SCOPES))


def make_jobs(cluster: Cluster, **settings: Any) -> Jobs:
    return Jobs(GatewaySettings(**settings), lambda: cluster.gateway_address)


@pytest.fixture
async def jobs(cluster: Cluster) -> AsyncIterator[Jobs]:
    running = make_jobs(cluster)
    yield running
    await running.close()


async def until(condition: Callable[[], bool], job: Job) -> None:
    async with asyncio.timeout(110):
        while not condition():
            assert job.state != "failed", job.error
            await asyncio.sleep(0.05)


async def ended(job: Job) -> None:
    async with asyncio.timeout(110):
        while job.is_live:
            await asyncio.sleep(0.05)


async def test_a_job_outlives_its_gateway_by_its_checkpoints(
    cluster: Cluster, jobs: Jobs, viewer: Viewer, tmp_path: Path
) -> None:
    """Stopped with its gateway, it goes on at another one that is given the same file, to the same end."""
    content = write_rows(tmp_path / "rows.jsonl").read_bytes()
    whole = await jobs.start(viewer, "rows.jsonl", content, OPTIONS)
    await ended(whole)
    assert (whole.state, whole.step) == ("finished", whole.steps)
    first = make_jobs(cluster)
    job = await first.start(viewer, "rows.jsonl", content, {**OPTIONS, "name": "again"})
    await until(lambda: job.step >= 7, job)
    await first.close()
    assert job.state == "stopped"
    assert job.step < job.steps
    resumed = await jobs.start(viewer, "rows.jsonl", content, {**OPTIONS, "name": "again", "resume": job.run})
    await ended(resumed)
    assert (resumed.state, resumed.run, resumed.step) == ("finished", job.run, whole.steps)
    with ServiceClient(cluster.gateway_address, viewer.secret) as service:
        series = [
            {p.step: p.values["loss:sum"] for p in service.list_metrics(run).points if p.source == "service"}
            for run in (whole.run, resumed.run)
        ]
        assert service.get_adapter(f"{job.run}/revisions/final").step == whole.steps
    assert series[0] == series[1]


async def test_a_bad_file_fails_with_its_place_and_no_path_of_the_server(jobs: Jobs, viewer: Viewer) -> None:
    job = await jobs.start(viewer, "rows.jsonl", b'{"prompt": "a", "response": "b"}\n{"prompt": \n', OPTIONS)
    await ended(job)
    assert job.state == "failed"
    assert "rows.jsonl" in job.error
    assert "2" in job.error
    assert "/" not in job.error


async def test_what_a_job_may_not_be_told_is_not_heard(jobs: Jobs, viewer: Viewer, tmp_path: Path) -> None:
    """A form that was tampered with cannot read the server's files, and a job's key is nowhere to be read."""
    content = write_rows(tmp_path / "rows.jsonl").read_bytes()
    elsewhere = write_rows(tmp_path / "private.jsonl")
    job = await jobs.start(viewer, "../../x.jsonl", content, {**OPTIONS, "data": str(elsewhere), "epochs": 1.0})
    assert job.file == "x.jsonl"
    (process,) = jobs._processes.values() or [None]
    if process is not None:
        proc = Path(f"/proc/{process.pid}")
        assert viewer.secret.encode() not in proc.joinpath("cmdline").read_bytes()
        assert viewer.secret.encode() not in proc.joinpath("environ").read_bytes()
    await ended(job)
    assert job.state == "finished", job.error


async def test_jobs_are_bounded_and_seen_by_their_owner(cluster: Cluster, viewer: Viewer, tmp_path: Path) -> None:
    jobs = make_jobs(cluster, max_jobs_per_tenant=1, max_jobs=1)
    content = write_rows(tmp_path / "rows.jsonl").read_bytes()
    other = Viewer("k", Principal("somebody", SCOPES))
    try:
        job = await jobs.start(viewer, "rows.jsonl", content, OPTIONS)
        for one, reason in ((viewer, "QUEUE_FULL"), (other, "QUEUE_FULL")):
            with pytest.raises(TreadleError) as caught:
                await jobs.start(one, "rows.jsonl", content, OPTIONS)
            assert caught.value.reason == reason
        assert jobs.of(viewer) == [job]
        assert jobs.of(other) == []
        assert jobs.of(Viewer("k", Principal("root", frozenset({"admin"})))) == [job]
    finally:
        await jobs.close()
    sampler = Viewer("k", Principal("somebody", frozenset({"train"})))
    refused: list[Awaitable[Job]] = [
        jobs.start(sampler, "rows.jsonl", content, OPTIONS),
        jobs.start(viewer, "rows.jsonl", b"", OPTIONS),
    ]
    for call, reason in zip(refused, ("PERMISSION_DENIED", "BAD_VALUE"), strict=True):
        with pytest.raises(TreadleError) as caught:
            await call
        assert caught.value.reason == reason
