"""What a store tells Prometheus: what it holds, counted now and then, and the live workers.

Counting rows takes a moment, so it is done every half minute and not at each scrape. Knows nothing of who asks.
"""

import asyncio
import shutil
from collections import Counter as Tally
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from sqlalchemy import Connection, func, select

from treadle.errors import TreadleError
from treadle.v1 import admin_pb2
from treadle_service.logs import get_logger
from treadle_service.metrics import Labels, Reading
from treadle_store.clock import Clock
from treadle_store.database import Database
from treadle_store.settings import StoreSettings
from treadle_store.tables import adapter_files, adapters, leases, ops, results, runs, snapshots, tenants
from treadle_store.workers import WorkerRegistry

PERIOD_SECONDS: Final = 30.0
_KINDS: Final[dict[int, str]] = {admin_pb2.WORKER_KIND_TRAINER: "trainer", admin_pb2.WORKER_KIND_SAMPLER: "sampler"}
log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Counts:
    """What the rows say."""

    tenants: int = 0
    runs: int = 0
    diverged_runs: int = 0
    leases: int = 0
    unleased_runs: int = 0
    operations: int = 0
    unfinished_operations: int = 0
    adapters: int = 0
    adapter_bytes: int = 0
    snapshot_bytes: int = 0


def count_rows(connection: Connection, now_us: int) -> Counts:
    """Counts what the store holds; body for Database.read."""

    def number(query: object) -> int:
        return int(connection.execute(query).scalar_one() or 0)  # type: ignore[call-overload]  # One integer each.

    held = (leases.c.holder != "", leases.c.expires_us > now_us)
    leased = select(leases.c.run).where(leases.c.tenant == runs.c.tenant, leases.c.run == runs.c.run, *held)
    unfinished = runs.c.last_seq > runs.c.last_done_seq
    return Counts(
        tenants=number(select(func.count()).select_from(tenants)),
        runs=number(select(func.count()).select_from(runs)),
        diverged_runs=number(select(func.count()).where(runs.c.divergence.is_not(None))),
        leases=number(select(func.count()).select_from(leases).where(*held)),
        unleased_runs=number(select(func.count()).select_from(runs).where(unfinished, ~leased.exists())),
        operations=number(select(func.count()).select_from(ops)),
        unfinished_operations=number(select(func.count()).select_from(ops))
        - number(select(func.count()).select_from(results)),
        adapters=number(select(func.count()).select_from(adapters).where(adapters.c.deleted_us.is_(None))),
        adapter_bytes=number(select(func.sum(adapter_files.c.size))),
        snapshot_bytes=number(select(func.sum(snapshots.c.size))),
    )


class StoreFigures:
    """The counts as of a moment ago; `run` keeps them fresh."""

    def __init__(self, database: Database, workers: WorkerRegistry, settings: StoreSettings, clock: Clock) -> None:
        self._database, self._workers, self._settings, self._clock = database, workers, settings, clock
        self._counts = Counts()

    async def run(self) -> None:
        """Counts again and again until cancelled."""
        while True:
            try:
                self._counts = await self._database.read(lambda connection: count_rows(connection, self._clock()))
            except TreadleError as error:
                log.warning("counting_failed", reason=error.reason, message=error.message)
            await asyncio.sleep(PERIOD_SECONDS)

    def readings(self) -> tuple[Reading, ...]:
        """Returns what is read from the store."""
        return (
            Reading("treadle_store_tenants", "Tenants", lambda: self._counts.tenants),
            Reading("treadle_store_runs", "Runs", lambda: self._counts.runs),
            Reading("treadle_store_diverged_runs", "Runs that are read-only", lambda: self._counts.diverged_runs),
            Reading("treadle_store_leases", "Runs that a trainer works on", lambda: self._counts.leases),
            Reading(
                "treadle_store_unleased_runs",
                "Runs with work and without a trainer",
                lambda: self._counts.unleased_runs,
            ),
            Reading("treadle_store_operations", "Operations in the journal", lambda: self._counts.operations),
            Reading(
                "treadle_store_unfinished_operations",
                "Those without a result",
                lambda: self._counts.unfinished_operations,
            ),
            Reading("treadle_store_adapters", "Saved adapters", lambda: self._counts.adapters),
            Reading("treadle_store_adapter_bytes", "Bytes of their files", lambda: self._counts.adapter_bytes),
            Reading("treadle_store_snapshot_bytes", "Bytes of newest snapshots", lambda: self._counts.snapshot_bytes),
            Reading(
                "treadle_store_waiting_writes", "Writes that wait for a transaction", lambda: self._database.num_waiting
            ),
            Reading("treadle_store_free_bytes", "Free space where the data is", self._free_bytes),
            Reading("treadle_store_workers", "Live workers", self._live, labels=("kind", "base")),
            Reading(
                "treadle_store_worker_queue",
                "Work that waits or runs in workers",
                self._queues,
                labels=("kind", "base"),
            ),
        )

    def _free_bytes(self) -> float:
        return shutil.disk_usage(self._settings.data_dir).free

    def _live(self) -> Iterable[tuple[Labels, float]]:
        tally = Tally((worker.kind, worker.base) for worker in self._worker_list())
        return [_labelled(key, number) for key, number in tally.items()]

    def _queues(self) -> Iterable[tuple[Labels, float]]:
        depths: Tally[tuple[int, str]] = Tally()
        for worker in self._worker_list():
            depths[worker.kind, worker.base] += worker.queue_depth
        return [_labelled(key, number) for key, number in depths.items()]

    def _worker_list(self) -> list[admin_pb2.Worker]:
        return [entry.worker for entry in self._workers.live()]


def _labelled(key: tuple[int, str], number: float) -> tuple[Labels, float]:
    return {"kind": _KINDS.get(key[0], "other"), "base": key[1]}, number
