"""The device's two threads, seen from the event loop as awaitable calls.

One thread runs passes over the base. The other does what needs no base beside them: optimizer steps, copies, exports.
Calls on one thread run one after the other, in the order in which they were made; between the two there is no order,
so whoever calls keeps what touches the same run apart. What goes in and comes out are plain values. With a leader the
calls are made on all ranks of its group. Knows nothing of what the calls do.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Concatenate, ParamSpec, TypeVar

from treadle.errors import TreadleError, make_error
from treadle_engine.errors import EngineError
from treadle_engine.rank_group import RankGroup
from treadle_service.logs import get_logger
from treadle_trainer.device import Device
from treadle_trainer.ranks import Leader

P = ParamSpec("P")
R = TypeVar("R")
log = get_logger(__name__)


class Executor:
    """Runs methods of the one Device on its own threads."""

    def __init__(self, leader: Leader | None = None) -> None:
        self._leader = leader
        self._beating: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="device")
        self._side_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="beside")
        self._device: Device | None = None

    async def start(self, load: Callable[[], Device]) -> Device:
        """Loads the device on its thread; only the immutable facts of the returned one may be read elsewhere."""
        loop = asyncio.get_running_loop()
        self._device = await loop.run_in_executor(self._thread, load)
        await loop.run_in_executor(self._side_thread, self._device.join_thread)
        if self._leader is not None:
            self._beating = asyncio.create_task(self._beat(self._leader.beat_seconds))
        return self._device

    def call(self, method: Callable[Concatenate[Device, P], R], *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[R]:
        """Queues `method` of the device at once; the future has its result, or a TreadleError for what went wrong."""
        made = method if self._leader is None else partial(self._leader.on_passes, method)
        return asyncio.get_running_loop().run_in_executor(
            self._thread, lambda: _guarded(self._device, made, *args, **kwargs)
        )

    def beside(
        self, method: Callable[Concatenate[Device, P], R], *args: P.args, **kwargs: P.kwargs
    ) -> asyncio.Future[R]:
        """Queues `method` like `call`, but on the thread beside the passes."""
        made = method if self._leader is None else partial(self._leader.on_side, method)
        return asyncio.get_running_loop().run_in_executor(
            self._side_thread, lambda: _guarded(self._device, made, *args, **kwargs)
        )

    async def drop(self, run: str) -> None:
        """Makes the device forget a run, after all that was queued for it on either thread."""
        await self.beside(Device.rest)
        await self.call(Device.drop, run)

    def stop(self) -> None:
        """Ends the threads after the calls that were made."""
        if self._beating is not None:
            self._beating.cancel()
        if self._leader is not None:
            self._side_thread.submit(self._leader.end_side)
            self._thread.submit(self._leader.end_passes)
        self._side_thread.shutdown(wait=True)
        self._thread.shutdown(wait=True)
        if self._leader is not None:
            RankGroup.leave()

    async def _beat(self, seconds: float) -> None:
        """Has the other ranks hear on both threads that this one lives; finds out when one of them is lost."""
        while True:
            await asyncio.sleep(seconds)
            await asyncio.gather(self.call(Device.rest), self.beside(Device.rest))


def _guarded(
    device: Device | None, method: Callable[Concatenate[Device, P], R], *args: P.args, **kwargs: P.kwargs
) -> R:
    if device is None:
        raise make_error("UNAVAILABLE", "the base is still being loaded")
    try:
        return method(device, *args, **kwargs)
    except EngineError as error:
        raise make_error(error.reason, error.message) from error
    except TreadleError:
        raise
    except Exception as error:
        log.exception("device_fault", exc_info=error)
        raise make_error(
            "INTERNAL", f"the device failed at this operation ({type(error).__name__}); send it again as a new one"
        ) from error
