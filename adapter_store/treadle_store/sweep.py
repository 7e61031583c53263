"""Garbage collection: marks blobs from the rows that name them, sweeps the others after a grace period.

The grace covers the time between storing a blob and recording the row that names it: storing a blob, or having it
kept, starts its grace anew. A blob that was marked unused a moment ago and is older than its grace cannot have got a
row since, so marks must be much younger than the grace: they are taken anew for every batch.
"""

import asyncio
from typing import Final

from sqlalchemy import Connection, exists, select, union

from treadle.errors import TreadleError
from treadle_service.logs import get_logger
from treadle_store.adapters import purge_adapters
from treadle_store.blobs import BlobStore
from treadle_store.clock import Clock
from treadle_store.database import Database
from treadle_store.tables import adapter_files, holds, ops, snapshots

# Blobs that are removed on one look at the rows.
BATCH: Final = 256
log = get_logger(__name__)


def used_blobs(connection: Connection) -> set[str]:
    """Returns the addresses that any row names."""
    long_payloads = select(ops.c.payload_sha256).where(ops.c.payload_sha256.is_not(None))
    marks = union(long_payloads, select(snapshots.c.sha256), select(adapter_files.c.sha256))
    return set(connection.execute(marks).scalars())


def mark(connection: Connection, now_us: int) -> set[str] | None:
    """Returns used_blobs, or None while somebody copies blobs, so that none may go."""
    if connection.execute(select(exists().where(holds.c.expires_us > now_us))).scalar_one():
        return None
    return used_blobs(connection)


class Sweeper:
    """Collects periodically what no row names. Any number of sweepers may do so at once."""

    def __init__(self, database: Database, blobs: BlobStore, clock: Clock, grace_seconds: float) -> None:
        self._database = database
        self._blobs = blobs
        self._clock = clock
        self._grace_seconds = grace_seconds

    async def sweep(self, deleted_grace_seconds: float) -> int:
        """Removes deleted adapters and unused blobs whose grace is over; returns the number of removed blobs."""
        before_us = self._clock() - int(deleted_grace_seconds * 1e6)
        purged = await self._database.write(lambda connection: purge_adapters(connection, before_us))
        unused, removed = await self.unused(), 0
        for start in range(0, len(unused), BATCH):
            used = await self._database.read(self._mark)
            if used is None:
                break
            batch = [address for address in unused[start : start + BATCH] if address not in used]
            removed += await asyncio.to_thread(self._sweep_blobs, batch)
        await asyncio.to_thread(self._blobs.tidy, self._grace_seconds)
        if removed or purged:
            log.info("swept", blobs=removed, adapters=purged)
        return removed

    async def unused(self) -> list[str]:
        """Returns the blobs that no row names, whatever their age; none while a hold lasts."""
        used = await self._database.read(self._mark)
        if used is None:
            log.info("sweep_put_off", reason="a backup is being taken")
            return []
        return await asyncio.to_thread(lambda: [address for address in self._blobs.addresses() if address not in used])

    async def run(self, period_seconds: float, deleted_grace_seconds: float) -> None:
        """Sweeps until cancelled."""
        while True:
            await asyncio.sleep(period_seconds)
            try:
                await self.sweep(deleted_grace_seconds)
            except (TreadleError, OSError) as error:
                log.warning("sweep_failed", error=str(error))

    def _mark(self, connection: Connection) -> set[str] | None:
        return mark(connection, self._clock())

    def _sweep_blobs(self, unused: list[str]) -> int:
        return sum(self._blobs.sweep(address, self._grace_seconds) for address in unused)
