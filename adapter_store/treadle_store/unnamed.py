"""Collects unnamed revisions: those that a training loop saves at every step and never asks for again.

An unnamed revision stays while it is one of the newest few of a run that exists, or was saved or used lately; so does
one that another run still starts from. Uses are noted in memory and written down with each collection.
"""

import asyncio
from collections.abc import Sequence
from functools import partial

from sqlalchemy import Connection, and_, bindparam, delete, exists, func, select, update

from treadle.errors import TreadleError
from treadle.names import AdapterName, parse_adapter
from treadle_service.logs import get_logger
from treadle_store.adapters import expire_adapters, is_adapter_row, is_needed
from treadle_store.blobs import BlobStore
from treadle_store.clock import Clock
from treadle_store.database import Database
from treadle_store.revision_feed import RevisionFeed
from treadle_store.sweep import mark
from treadle_store.tables import adapter_files, adapters, runs

log = get_logger(__name__)


class UnnamedRevisions:
    """Notes uses of unnamed revisions and collects what nobody asks for."""

    def __init__(
        self,
        database: Database,
        blobs: BlobStore,
        feed: RevisionFeed,
        clock: Clock,
        *,
        num_kept: int,
        idle_seconds: float,
    ) -> None:
        """Keeps `num_kept` per run, and all that were used within `idle_seconds`."""
        self._database, self._blobs, self._feed, self._clock = database, blobs, feed, clock
        self._num_kept, self._idle_seconds = num_kept, idle_seconds
        self._used_us: dict[str, int] = {}

    def note_use(self, name: str) -> None:
        """Remembers that somebody asked for a revision now."""
        self._used_us[name] = self._clock()

    async def collect(self) -> int:
        """Hides what has expired, writes uses down, removes unnamed revisions that are due with their blobs.

        Tells the watchers; returns how many unnamed ones went.
        """
        for expired, base in await self._database.write(partial(expire_adapters, now_us=self._clock())):
            self._feed.removed(base, expired)
        used, self._used_us = self._used_us, {}
        before_us = self._clock() - int(self._idle_seconds * 1e6)
        body = partial(collect_rows, used_us=used, num_kept=self._num_kept, before_us=before_us)
        gone = await self._database.write(body)
        for name, base, _ in gone:
            self._feed.removed(base, str(name))
        if gone:
            still_used = await self._database.read(lambda connection: mark(connection, self._clock()))
            addresses = {sha256 for _, _, files in gone for sha256 in files}
            # While a backup is taken they stay, and a later sweep finds them.
            if still_used is not None:
                await asyncio.to_thread(self._sweep_blobs, addresses - still_used)
            log.info("unnamed_revisions_collected", revisions=len(gone))
        return len(gone)

    async def run(self, period_seconds: float) -> None:
        """Collects until cancelled."""
        while True:
            await asyncio.sleep(period_seconds)
            try:
                await self.collect()
            except (TreadleError, OSError) as error:
                log.warning("collection_failed", error=str(error))

    def _sweep_blobs(self, addresses: set[str]) -> None:
        for sha256 in addresses:
            # The same grace as for the row: whoever stores the same content just now has renewed it.
            self._blobs.sweep(sha256, self._idle_seconds)


def collect_rows(
    connection: Connection, *, used_us: dict[str, int], num_kept: int, before_us: int
) -> list[tuple[AdapterName, str, Sequence[str]]]:
    """Records uses and deletes the rows that are due; returns each one's name, base and blobs."""
    if used_us:
        names = [(parse_adapter(name), when) for name, when in used_us.items()]
        wanted = and_(
            adapters.c.tenant == bindparam("by_tenant"),
            adapters.c.run == bindparam("by_run"),
            adapters.c.kind == bindparam("by_kind"),
            adapters.c.adapter == bindparam("by_adapter"),
        )
        connection.execute(
            update(adapters).where(wanted).values(used_us=bindparam("when")),
            [
                {"by_tenant": n.tenant, "by_run": n.run, "by_kind": n.kind, "by_adapter": n.adapter, "when": when}
                for n, when in names
            ],
        )
    order = func.row_number().over(
        partition_by=(adapters.c.tenant, adapters.c.run),
        order_by=(adapters.c.created_us.desc(), adapters.c.adapter.desc()),
    )
    ranked = (
        select(*adapters.c, order.label("place"))
        .where(adapters.c.unnamed, adapters.c.deleted_us.is_(None))
        .subquery("ranked")
    )
    has_run = exists().where(runs.c.tenant == ranked.c.tenant, runs.c.run == ranked.c.run)
    idle = func.coalesce(ranked.c.used_us, ranked.c.created_us) < before_us
    rows = connection.execute(select(ranked).where(idle, (ranked.c.place > num_kept) | ~has_run)).all()
    gone: list[tuple[AdapterName, str, Sequence[str]]] = []
    for row in rows:
        name = AdapterName(row.tenant, row.run, "revisions", row.adapter)
        if connection.execute(select(is_needed(name))).scalar_one():
            continue
        files = select(adapter_files.c.sha256).where(
            adapter_files.c.tenant == name.tenant,
            adapter_files.c.run == name.run,
            adapter_files.c.kind == name.kind,
            adapter_files.c.adapter == name.adapter,
        )
        gone.append((name, row.base, list(connection.execute(files).scalars())))
        connection.execute(delete(adapters).where(is_adapter_row(name)))
    return gone
