"""What is wrong with a deployment, from what it says of itself: pure functions from facts to findings.

Each finding says what was seen and what to do. Knows neither the wire nor files; `treadle doctor` gathers the facts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Literal

from treadle.v1 import admin_pb2, training_pb2

Severity = Literal["ok", "warning", "error"]

MOST_SKEW_SECONDS: Final = 5.0
"""Keys and leases end by the store's clock; a client's may differ by a little."""
LEAST_CERTIFICATE_DAYS: Final = 14.0
LEAST_FREE_SHARE: Final = 0.1
LEAST_FREE_BYTES: Final = 2 * 2**30
DEEP_QUEUE: Final = 64
FULL: Final = 0.9


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    check: str
    severity: Severity
    seen: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Disk:
    """A file system; `where` is the folder that was asked about."""

    where: str
    free_bytes: int
    total_bytes: int


def check_certificate(not_after: datetime | None, now: datetime) -> Finding:
    """Looks at the end of the gateway's certificate; None for a gateway without one."""
    if not_after is None:
        return Finding(
            "TLS", "warning", "the gateway speaks plaintext", "set tls_cert and tls_key unless the network is trusted"
        )
    days = (not_after - now).total_seconds() / 86_400
    seen = f"the gateway's certificate ends {not_after:%Y-%m-%d}, in {days:.0f} days"
    if days < LEAST_CERTIFICATE_DAYS:
        return Finding("TLS", "error" if days < 0 else "warning", seen, "renew it; servers pick up changed files")
    return Finding("TLS", "ok", seen)


def check_clock(theirs: datetime | None, ours: datetime) -> Finding:
    """Compares the store's clock, as its workers' signs of life show it, with ours."""
    if theirs is None:
        return Finding("clock", "warning", "no worker was heard of, so the store's clock is not known")
    skew = (ours - theirs).total_seconds()
    seen = f"this machine's clock and the store's differ by at most {abs(skew):.1f} s"
    if skew < -MOST_SKEW_SECONDS or skew > 3 * MOST_SKEW_SECONDS:
        return Finding("clock", "warning", seen, "run a time service on both: keys and quotas end by the store's clock")
    return Finding("clock", "ok", seen)


def check_versions(client: str, service: str) -> Finding:
    """Compares releases; neighbouring ones work together."""
    seen = f"client {client}, service {service}"
    if client.split(".")[:2] == service.split(".")[:2]:
        return Finding("versions", "ok", seen)
    advice = "upgrade the older side: only neighbouring releases are tested together"
    return Finding("versions", "warning", seen, advice)


def check_workers(workers: Sequence[admin_pb2.Worker], bases: Sequence[admin_pb2.BaseModel]) -> Iterator[Finding]:
    """Looks for bases that cannot be trained or sampled, and for workers that are full or about to go."""
    if not workers:
        yield Finding("workers", "error", "no trainer and no sampler is up", "start them, or look at their logs")
    for base in bases:
        kinds = [name for name, there in (("trainer", base.trainable), ("sampler", base.sampleable)) if not there]
        for kind in kinds:
            yield Finding("workers", "warning", f"{base.name} has no {kind}", f"start a {kind} with this base")
    for worker in workers:
        if worker.draining:
            advice = "wait until it has gone, or start it again"
            yield Finding("workers", "warning", f"{worker.worker} is draining", advice)
        if worker.queue_depth > DEEP_QUEUE:
            yield Finding(
                "workers",
                "warning",
                f"{worker.worker} has {worker.queue_depth} operations or requests waiting or running",
                "add workers of this base; `treadle plan` says how many are needed",
            )
    names = ", ".join(f"{worker.worker} ({worker.base})" for worker in workers)
    if names:
        yield Finding("workers", "ok", names)


def check_runs(runs: Sequence[training_pb2.Run]) -> Iterator[Finding]:
    """Looks for runs that are read-only, and for those that have work and nobody who does it."""
    for run in runs:
        unfinished = run.next_seq - 1 - run.last_done_seq
        if run.state == training_pb2.RUN_STATE_DIVERGED:
            yield Finding(
                "runs", "error", f"{run.name} has diverged and is read-only", "start a new run from its last checkpoint"
            )
        elif unfinished > 0 and not run.worker:
            yield Finding(
                "runs",
                "warning",
                f"{run.name} has {unfinished} unfinished operations and no trainer",
                "connect to it again: the next call brings it to a trainer; if that fails, its base has none",
            )
    yield Finding("runs", "ok", f"{len(runs)} runs of this key's tenant were looked at")


def check_quota(quota: admin_pb2.Quota, usage: admin_pb2.GetUsageResponse) -> Iterator[Finding]:
    """Looks for limits that are nearly reached."""
    limits = (
        ("stored bytes", "max_stored_bytes", usage.stored_bytes, "delete adapters and runs that nobody needs"),
        ("runs", "max_runs", usage.num_runs, "delete runs that are done"),
        ("active runs", "max_active_runs", usage.num_active_runs, "close clients whose runs are done"),
    )
    for what, name, used, advice in limits:
        limit = getattr(quota, name)
        if quota.HasField(name) and used >= FULL * limit:
            yield Finding("quota", "warning", f"{used} of {limit} {what} are used", f"{advice}, or raise the quota")
    seen = f"{usage.num_runs} runs, {usage.num_active_runs} active, {usage.stored_bytes} bytes stored"
    yield Finding("quota", "ok", seen)


def check_disk(disk: Disk) -> Finding:
    """Looks at the space where the store's data are."""
    seen = f"{disk.free_bytes / 2**30:.1f} GiB of {disk.total_bytes / 2**30:.1f} are free in {disk.where}"
    if disk.free_bytes < min(LEAST_FREE_BYTES, LEAST_FREE_SHARE * disk.total_bytes):
        return Finding("disk", "error", seen, "make room: a full disk makes every write wait; `treadle store gc` helps")
    return Finding("disk", "ok", seen)
