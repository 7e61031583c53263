"""Where the states of resident runs are: on the device, in host memory, or in the store only.

A run that nobody has used for a moment gives up its gradient and its compute copy; beyond the budget the least
recently used idle runs leave memory for their snapshots. Their order, results and streams stay, so that nobody
notices but by the time that the next operation takes. Knows nothing of passes or of the wire.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final

from treadle.errors import TreadleError
from treadle_service.logs import get_logger
from treadle_trainer import operations
from treadle_trainer.device import Device
from treadle_trainer.device_loop import DeviceLoop
from treadle_trainer.executor import Executor
from treadle_trainer.journal_client import JournalClient
from treadle_trainer.memory import host_memory
from treadle_trainer.resident import Place, Resident
from treadle_trainer.snapshots import Snapshots

DEFAULT_SHARE: Final = 0.25
"""Share of the machine's memory that states may take unless a setting says otherwise."""
_MOVES_AT_ONCE: Final = 8
log = get_logger(__name__)


class Residency:
    """Moves states between the places, the least recently used first."""

    def __init__(
        self,
        executor: Executor,
        loop: DeviceLoop,
        store: JournalClient,
        snapshots: Snapshots,
        residents: Callable[[], list[Resident]],
        on_lost: Callable[[Resident, str], None],
        max_bytes: int,
    ) -> None:
        """Keeps states within `max_bytes` (0: a share of the machine's memory).

        `on_lost` hears of a run whose state could not be brought in.
        """
        self._executor, self._loop, self._store, self._snapshots = executor, loop, store, snapshots
        self._residents, self._on_lost = residents, on_lost
        self.max_bytes = max_bytes or int(DEFAULT_SHARE * host_memory())
        self._coming: dict[str, int] = {}
        self._room = asyncio.Lock()
        loop.bring_in = self.bring_in

    async def make_room(self, run: str, num_bytes: int) -> None:
        """Sends idle runs to the store until so many bytes fit, and reserves them for `run` until `arrived`.

        Runs that work are never sent away: if nothing is idle, the budget is exceeded until something is.
        """
        async with self._room:
            self._coming[run] = num_bytes
            while (over := self._used() - self.max_bytes) > 0:
                leaving: list[Resident] = []
                freed = 0
                for resident in self._idle():
                    if freed >= over or len(leaving) == _MOVES_AT_ONCE:
                        break
                    leaving.append(resident)
                    freed += resident.state_bytes
                if not any(await asyncio.gather(*(self._send_to_store(resident) for resident in leaving))):
                    return

    def arrived(self, run: str) -> None:
        """Ends a reservation: the run is resident now, or will not come."""
        self._coming.pop(run, None)

    def park_idle(self, seconds: float) -> None:
        """Moves runs that were not used for so long from the device to host memory."""
        until = time.monotonic() - seconds
        for resident in self._idle():
            if resident.place is Place.DEVICE and resident.last_used <= until:
                resident.place = Place.HOST
                self._loop.hold(resident, self._executor.beside(Device.park, resident.name))

    def bring_in(self, resident: Resident) -> None:
        """Begins to bring a run's state onto the device; nothing of it starts before."""
        if resident.place is Place.HOST:
            resident.place = Place.DEVICE
            self._loop.hold(resident, self._executor.beside(Device.unpark, resident.name))
        elif resident.place is Place.STORE:
            task = asyncio.create_task(self._fetch(resident))
            self._loop.hold(resident, task)

    def _used(self) -> int:
        here = sum(resident.state_bytes for resident in self._residents() if resident.place is not Place.STORE)
        return here + sum(self._coming.values())

    def _idle(self) -> list[Resident]:
        """Returns idle runs in memory, the least recently used first."""
        idle = [run for run in self._residents() if run.idle and run.place is not Place.STORE]
        return sorted(idle, key=lambda run: run.last_used)

    async def _send_to_store(self, resident: Resident) -> bool:
        """Leaves a run's state to its snapshot; returns whether it did: an operation may have come meanwhile."""
        if resident.snapshot_seq != resident.order.boundary_seq or not resident.snapshot_sha256:
            await self._snapshots.request(resident)
        covered = resident.snapshot_seq == resident.order.boundary_seq and resident.snapshot_sha256
        if not (resident.idle and covered and resident.diverged is None):
            return False
        resident.place = Place.STORE
        gone = asyncio.create_task(self._executor.drop(resident.name))
        self._loop.hold(resident, gone)
        await gone
        log.debug("state_left", run=resident.name, size_bytes=resident.state_bytes)
        return True

    async def _fetch(self, resident: Resident) -> None:
        began = time.monotonic()
        try:
            await self.make_room(resident.name, resident.state_bytes)
            config = operations.lora_config(resident.facts.lora)
            data = await self._store.get_file(resident.snapshot_sha256, verify=False)
            if resident.closed is not None:
                return
            await self._executor.beside(Device.restore, resident.name, config, data, resident.snapshot_digest)
        except TreadleError as error:
            log.warning("state_lost", run=resident.name, reason=error.reason, message=error.message)
            if resident.closed is None:
                self._on_lost(resident, error.reason)
            return
        finally:
            self.arrived(resident.name)
        resident.place = Place.DEVICE
        log.debug("state_came", run=resident.name, size_bytes=resident.state_bytes, seconds=time.monotonic() - began)
