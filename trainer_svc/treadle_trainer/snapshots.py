"""Snapshots of runs at step boundaries: copied on the thread beside the passes, stored while computing goes on.

A snapshot stands for all operations up to its seq, so it is recorded only after their results are durable. Knows
neither streams nor how a snapshot is read again (recovery does).
"""

from __future__ import annotations

import asyncio

from treadle.errors import TreadleError
from treadle.internal.v1 import journal_pb2
from treadle_service import failpoints
from treadle_service.logs import get_logger
from treadle_trainer import counters
from treadle_trainer.device import Device, StateCopy
from treadle_trainer.executor import Executor
from treadle_trainer.journal_client import JournalClient
from treadle_trainer.resident import Place, Resident

log = get_logger(__name__)


class Snapshots:
    """Takes and stores snapshots, at most one of a run at a time."""

    def __init__(self, executor: Executor, store: JournalClient, every_steps: int) -> None:
        self._executor, self._store, self._every_steps = executor, store, every_steps
        self._under_way: dict[str, asyncio.Future[None]] = {}
        self._uploads: set[asyncio.Task[None]] = set()

    def after_step(self, resident: Resident, step: int) -> None:
        """Takes a snapshot if the step's number asks for one."""
        if step % self._every_steps == 0:
            self.request(resident)

    def request(self, resident: Resident) -> asyncio.Future[None]:
        """Takes a snapshot of the run's last step boundary; the future ends when it is stored, or could not be.

        No step or load of the run may be under way.
        """
        under_way = self._under_way.get(resident.name)
        if under_way is not None:
            return under_way
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        seq, num_failed = resident.order.boundary_seq, resident.order.num_failed
        if resident.diverged is not None or resident.closed is not None or resident.place is Place.STORE:
            done.set_result(None)
            return done
        self._under_way[resident.name] = done
        # Queued at once: only steps and loads change the state, and those that come later are queued behind it.
        copying = self._executor.beside(Device.copy_state, resident.name, num_failed, self._store.new_file())
        task = asyncio.create_task(self._store_copy(resident, seq, copying, done))
        self._uploads.add(task)
        task.add_done_callback(self._uploads.discard)
        return done

    async def _store_copy(
        self, resident: Resident, seq: int, copying: asyncio.Future[StateCopy], done: asyncio.Future[None]
    ) -> None:
        try:
            copy = await copying
            snapshot = journal_pb2.Snapshot(seq=seq, step=copy.step, size=copy.size, state_digest=copy.digest)
            put = self._store.put_blob(copy.data) if isinstance(copy.data, bytes) else self._store.put_file(copy.data)
            with failpoints.around("trainer.put_snapshot"):
                snapshot.sha256 = await put
            await resident.wait_until(lambda: resident.results.committed_seq >= snapshot.seq)
            with failpoints.around("trainer.write_snapshot"):
                await self._store.write_snapshot(resident.name, resident.facts.epoch, snapshot)
            resident.snapshot_seq, resident.snapshot_sha256 = snapshot.seq, snapshot.sha256
            resident.snapshot_digest = snapshot.state_digest
            counters.SNAPSHOTS.labels("stored").inc()
            counters.SNAPSHOT_BYTES.inc(snapshot.size)
            log.info("snapshot", run=resident.name, seq=snapshot.seq, step=snapshot.step, size_bytes=snapshot.size)
        except TreadleError as error:
            # The journal still holds everything behind the snapshot before: nothing is lost but time.
            counters.SNAPSHOTS.labels("failed").inc()
            log.warning("snapshot_failed", run=resident.name, reason=error.reason, message=error.message)
        finally:
            self._end(resident, done)

    def _end(self, resident: Resident, done: asyncio.Future[None]) -> None:
        self._under_way.pop(resident.name, None)
        if not done.done():
            done.set_result(None)
