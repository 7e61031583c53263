"""Stores on one database tell each other which workers they hear of, so that each of them knows all.

Every second a store writes what it heard and reads what the others wrote. Rows last as long as a registration; a
store that is gone stops renewing its own. Runs only where there may be several stores.
"""

import asyncio
import contextlib
import secrets

from sqlalchemy import Connection, delete, insert, select

from treadle.errors import TreadleError
from treadle.internal.v1 import workers_pb2
from treadle_service.logs import get_logger
from treadle_store.clock import Clock
from treadle_store.database import Database
from treadle_store.tables import heard_workers
from treadle_store.workers import WorkerRegistry

log = get_logger(__name__)
Heard = list[tuple[workers_pb2.WorkerEntry, float]]


class WorkerExchange:
    """One store's part in the exchange."""

    def __init__(self, registry: WorkerRegistry, database: Database, clock: Clock) -> None:
        self._registry, self._database, self._clock = registry, database, clock
        self._store = secrets.token_hex(8)

    async def exchange(self) -> None:
        """Tells the others and takes over what they tell."""
        own = self._registry.heard()
        self._registry.take_over(await self._database.write(lambda connection: self._swap(connection, own)))

    async def run(self, period_seconds: float) -> None:
        """Exchanges until cancelled; then takes back what it told."""
        try:
            while True:
                try:
                    await self.exchange()
                except TreadleError as error:
                    log.warning("worker_exchange_failed", error=str(error))
                await asyncio.sleep(period_seconds)
        finally:
            # Without it the rows would end by themselves, a little later.
            with contextlib.suppress(TreadleError):
                await asyncio.shield(self._database.write(self._withdraw))

    def _swap(self, connection: Connection, own: Heard) -> Heard:
        now_us = self._clock()
        self._withdraw(connection)
        connection.execute(delete(heard_workers).where(heard_workers.c.expires_us <= now_us))
        rows = [
            {
                "store": self._store,
                "worker": entry.worker.worker,
                "entry": entry.SerializeToString(),
                "expires_us": now_us + int(seconds * 1e6),
            }
            for entry, seconds in own
        ]
        if rows:
            connection.execute(insert(heard_workers), rows)
        others = select(*heard_workers.c).where(heard_workers.c.store != self._store)
        return [
            (workers_pb2.WorkerEntry.FromString(row.entry), (row.expires_us - now_us) / 1e6)
            for row in connection.execute(others.order_by(heard_workers.c.expires_us))
        ]

    def _withdraw(self, connection: Connection) -> None:
        connection.execute(delete(heard_workers).where(heard_workers.c.store == self._store))
