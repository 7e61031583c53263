"""Garbage collection: marks blobs from the rows that name them, sweeps the others after a grace period.

The grace covers the time between storing a blob and recording the row that names it: storing a blob, or asking
whether it is there, starts its grace anew.
"""

import asyncio

from sqlalchemy import Connection, select, union

from treadle.errors import TreadleError
from treadle_service.logs import get_logger
from treadle_store.adapters import purge_adapters
from treadle_store.blobs import BlobStore
from treadle_store.clock import Clock
from treadle_store.database import Database
from treadle_store.tables import adapter_files, ops, snapshots

log = get_logger(__name__)


def used_blobs(connection: Connection) -> set[str]:
    """Returns the addresses that any row names."""
    long_payloads = select(ops.c.payload_sha256).where(ops.c.payload_sha256.is_not(None))
    marks = union(long_payloads, select(snapshots.c.sha256), select(adapter_files.c.sha256))
    return set(connection.execute(marks).scalars())


class Sweeper:
    """Collects periodically what no row names."""

    def __init__(self, database: Database, blobs: BlobStore, clock: Clock, grace_seconds: float) -> None:
        self._database = database
        self._blobs = blobs
        self._clock = clock
        self._grace_seconds = grace_seconds

    async def sweep(self, deleted_grace_seconds: float) -> int:
        """Removes deleted adapters and unused blobs whose grace is over; returns the number of removed blobs."""
        before_us = self._clock() - int(deleted_grace_seconds * 1e6)
        purged = await self._database.write(lambda connection: purge_adapters(connection, before_us))
        used = await self._database.read(used_blobs)
        removed = await asyncio.to_thread(self._sweep_blobs, used)
        if removed or purged:
            log.info("swept", blobs=removed, adapters=purged)
        return removed

    async def run(self, period_seconds: float, deleted_grace_seconds: float) -> None:
        """Sweeps until cancelled."""
        while True:
            await asyncio.sleep(period_seconds)
            try:
                await self.sweep(deleted_grace_seconds)
            except (TreadleError, OSError) as error:
                log.warning("sweep_failed", error=str(error))

    def _sweep_blobs(self, used: set[str]) -> int:
        unused = [address for address in self._blobs.addresses() if address not in used]
        return sum(self._blobs.sweep(address, self._grace_seconds) for address in unused)
