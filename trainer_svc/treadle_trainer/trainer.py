"""The trainer as a whole: which runs are resident, how they come and how they go.

A run comes when somebody wants it (claim, recovery) and goes when it is idle, evicted, taken by another trainer, or
when the trainer drains. Knows the parts by name and leaves the work to them.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, Final

from treadle import names
from treadle.errors import LimitError, TreadleError, UnavailableError, make_error
from treadle.internal.v1 import journal_pb2, trainer_pb2, workers_pb2
from treadle.v1 import admin_pb2, types_pb2
from treadle_service import failpoints
from treadle_service.budgets import TenantBudgets
from treadle_service.logs import get_logger
from treadle_service.registration import Registration
from treadle_trainer import counters
from treadle_trainer.adapters import Adapters
from treadle_trainer.device import Device
from treadle_trainer.device_loop import DeviceLoop
from treadle_trainer.executor import Executor
from treadle_trainer.fan_out import FanOut
from treadle_trainer.guests import Guests
from treadle_trainer.journal_client import JournalClient
from treadle_trainer.journal_writer import JournalWriter, Written
from treadle_trainer.neighbors import Neighbors
from treadle_trainer.operations import cost_message, lora_config, prepare
from treadle_trainer.rebalancer import Rebalancer
from treadle_trainer.recovery import Recovery
from treadle_trainer.residency import Residency
from treadle_trainer.resident import Place, Resident
from treadle_trainer.settings import TrainerSettings
from treadle_trainer.snapshots import Snapshots
from treadle_trainer.trace import PassTrace

HAND_OVER_SECONDS: Final = 60.0
_HAND_OVERS_AT_ONCE: Final = 4
_HOUSEKEEPING_SECONDS: Final = 1.0
_ASKED_AT_ONCE: Final = 1000
_HELD_SECONDS: Final = 0.1
log = get_logger(__name__)


class Trainer:
    """All resident runs on one device; `background` must be entered while it works."""

    def __init__(
        self, settings: TrainerSettings, executor: Executor, device: Device, store: JournalClient, address: str
    ) -> None:
        """Builds the parts; `device` is used here for its immutable facts only."""
        self.settings, self.info, self.trace = settings, device.info, PassTrace()
        self.address, self.budget = address, device.budget
        self.draining = False
        self._leave_by = math.inf
        self._executor, self._store = executor, store
        self._residents: dict[str, Resident] = {}
        self._loading: dict[str, asyncio.Task[Resident]] = {}
        self._leaving: dict[str, asyncio.Task[None]] = {}
        worker = admin_pb2.Worker(
            worker=settings.worker,
            kind=admin_pb2.WORKER_KIND_TRAINER,
            address=address,
            max_tokens_per_pass=self.budget.max_tokens,
            pass_cost=cost_message(self.budget.cost),
        )
        self.registration = Registration(store, worker, self.info, settings.lease_seconds / 3, self._describe_load)
        self._loop = DeviceLoop(executor, self.trace, self.budget, self._stepped)
        neighbors = Neighbors(settings.internal_token.get_secret_value(), settings.client_tls)
        self._guests = Guests(executor, self._loop, device, settings.fan_out_bytes)
        self._fan_out = FanOut(
            settings, executor, store, neighbors, self._loop, self.budget, self.info.name, self._guests.numerics
        )
        self._budgets = TenantBudgets("training")
        self._writer = JournalWriter(store, self._written, self._refused, self._budgets.learn)
        self.snapshots = Snapshots(executor, store, settings.snapshot_every_steps)
        self._residency = Residency(
            executor,
            self._loop,
            store,
            self.snapshots,
            lambda: self.residents,
            self._lose,
            settings.max_resident_bytes,
        )
        self._state_bytes = device.num_bytes
        self.rebalancer = Rebalancer(self, neighbors)
        adapters = Adapters(executor, self._loop, store, self.snapshots)
        self._recovery = Recovery(
            executor,
            store,
            self._writer,
            adapters.fetch,
            lambda operation, *, limited: prepare(operation, device.info, partial(device.split, limited=limited)),
            self._loop.wake,
            min(device.info.max_context, self.budget.max_tokens),
            device.info.name,
            self._budgets,
        )

    @property
    def residents(self) -> list[Resident]:
        """The runs that this trainer holds, wherever their states are."""
        return list(self._residents.values())

    @property
    def runs_in_memory(self) -> list[str]:
        """Names of the runs whose states are in memory."""
        return sorted(run.name for run in self._residents.values() if run.place is not Place.STORE)

    @asynccontextmanager
    async def background(self, on_crash: Callable[[BaseException], None]) -> AsyncIterator[None]:
        """Runs the loops; `on_crash` hears of one that ended, which only a fault can make it."""
        works = (
            self._loop.run_forever,
            self._writer.run_forever,
            self._keep_leases,
            self._tidy,
            self.registration.run_forever,
            self.rebalancer.run_forever,
            self._fan_out.run_forever,
        )
        tasks = [asyncio.create_task(_watched(work, on_crash)) for work in works]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self.rebalancer.close()

    async def open(self, name: str, tenant: str) -> Resident:
        """Returns a run of `tenant`, claimed and recovered if need be; RUN_NOT_FOUND, LEASE_HELD, DRAINING."""
        if names.parse_run(name).tenant != tenant:
            raise make_error("RUN_NOT_FOUND", f"there is no run {name!r}")
        leaving = self._leaving.get(name)
        if leaving is not None:
            await asyncio.shield(leaving)
        resident = self._residents.get(name)
        if resident is not None and resident.lease_until <= time.monotonic():
            # After a long pause the run may be somebody else's: its owner must not be shown an old state of it.
            await self._renew()
            resident = self._residents.get(name)
        if resident is not None and resident.closed is None:
            resident.last_used = time.monotonic()
            return resident
        if self.draining:
            raise make_error("DRAINING", "this trainer is about to stop; connect again", 0.0)
        task = self._loading.get(name)
        if task is None:
            task = self._loading[name] = asyncio.create_task(self._load(name))
            task.add_done_callback(lambda _: self._loading.pop(name, None))
        # One caller going away must not stop the others' recovery.
        return await asyncio.shield(task)

    async def read_result(self, name: str, seq: int) -> bytes:
        """Returns a result that is no longer in memory; OPERATION_NOT_FOUND, RESULT_GONE."""
        return await self._store.read_result(name, seq)

    async def scan_trainers(self) -> Sequence[workers_pb2.WorkerEntry]:
        """Returns the live trainers of this one's base, itself too."""
        return await self._store.scan_workers(admin_pb2.WORKER_KIND_TRAINER, self.info.name)

    def compute_chunks(
        self, requests: AsyncIterator[trainer_pb2.ComputeChunksRequest]
    ) -> AsyncIterator[trainer_pb2.ComputeChunksResponse]:
        """Computes chunks of a run that another trainer holds; UNAVAILABLE where that is not wanted."""
        if self.settings.fan_out == "off":
            raise make_error("UNAVAILABLE", "this trainer computes no chunks of other trainers' runs: fan_out is off")
        return self._guests.serve(requests)

    @property
    def fan_out(self) -> tuple[int, int]:
        """Batches that others help with, and runs of others that are helped here."""
        return self._fan_out.num_batches, self._guests.num_guests

    async def evict(
        self, name: str, error: TreadleError | None = None, then: Callable[[], Awaitable[None]] | None = None
    ) -> None:
        """Snapshots a run, gives its lease back and drops it; does nothing for one that is not here.

        `then` is awaited when the lease is free and the run's owner does not know yet.
        """
        resident = self._residents.get(name)
        if resident is None:
            return
        if name not in self._leaving:
            reason = error or make_error(
                "WORKER_LOST", f"{name} moves to another trainer; connect again and go on", 0.0
            )
            task = self._leaving[name] = asyncio.create_task(self._hand_over(resident, reason, then))
            task.add_done_callback(lambda _: self._leaving.pop(name, None))
        await asyncio.shield(self._leaving[name])

    async def drain(self) -> None:
        """Hands all runs over: finishes what runs, snapshots, releases, and tells the store that this worker goes.

        A few at a time: a run stands still for its own hand-over, and works on during those of the others. After
        HAND_OVER_SECONDS those that are left give up what is not written yet, all at once.
        """
        self.draining = self._guests.draining = True
        self._leave_by = time.monotonic() + HAND_OVER_SECONDS
        error = make_error("DRAINING", "the trainer is about to stop; connect again and go on", 0.0)
        # Off the list first: who is told to connect again must not be sent here.
        await self.registration.end()
        await asyncio.gather(*self._loading.values(), return_exceptions=True)
        turns = asyncio.Semaphore(_HAND_OVERS_AT_ONCE)

        async def leave(name: str) -> None:
            async with turns:
                await self.evict(name, error)

        with suppress(TimeoutError):
            async with asyncio.timeout(HAND_OVER_SECONDS):
                await asyncio.gather(*(leave(name) for name in list(self._residents)))
        await asyncio.gather(*(self.evict(name, error) for name in list(self._residents)))

    @property
    def queue_depth(self) -> int:
        """Operations that wait or run, over all runs."""
        return sum(len(resident.order) for resident in self._residents.values())

    @property
    def pace(self) -> float:
        """How much longer passes take than their measured cost says, lately."""
        return self._loop.pace

    @property
    def max_state_bytes(self) -> int:
        """Memory that the states of runs may take."""
        return self._residency.max_bytes

    def _describe_load(self, worker: admin_pb2.Worker) -> None:
        worker.num_resident, worker.queue_depth, worker.draining = len(self._residents), self.queue_depth, self.draining
        worker.load, worker.state_bytes = self.rebalancer.load, self.rebalancer.state_bytes
        worker.max_state_bytes = self.max_state_bytes

    async def _load(self, name: str) -> Resident:
        await self._make_room()
        asked = time.monotonic()
        counters.CLAIMS.labels("asked").inc()
        with failpoints.around("trainer.claim"):
            claim = await self._claim(name)
        self._budgets.learn([claim.budget])
        try:
            num_bytes = self._state_bytes(lora_config(claim.run.lora))
            await self._residency.make_room(name, num_bytes)
            resident = await self._recovery.load(name, claim)
            resident.state_bytes = num_bytes
            resident.lease_until = asked + self.settings.lease_seconds
        except TreadleError:
            # Somebody else may be able to; nobody must wait for the lease to expire.
            with suppress(TreadleError):
                await self._store.release(name, claim.lease.epoch)
            raise
        finally:
            self._residency.arrived(name)
        self.rebalancer.arrived(resident)
        self._residents[name] = resident
        counters.CLAIMS.labels("recovered").inc()
        self._loop.add(resident)
        if claim.from_adapter and resident.order.done_seq == 0 and resident.snapshot_seq == 0:
            # The adapter may be deleted later; the run must not need it again.
            self.snapshots.request(resident)
        return resident

    async def _claim(self, name: str) -> journal_pb2.ClaimRunResponse:
        """Takes the lease; a tenant with as many active runs as it may have gives up one that nobody uses."""
        try:
            return await self._ask_for_lease(name)
        except LimitError:
            tenant = names.parse_run(name).tenant
            unused = next((run for run in self._idle(0.0) if run.facts.tenant == tenant), None)
            if unused is None:
                raise
        await self.evict(unused.name)
        return await self._ask_for_lease(name)

    async def _ask_for_lease(self, name: str) -> journal_pb2.ClaimRunResponse:
        try:
            return await self._store.claim(name, self.settings.worker, self.address, self.settings.lease_seconds)
        except UnavailableError as error:
            if error.reason != "LEASE_HELD":
                raise
            # The store says when the lease ends; but its holder is alive or soon found dead, and whoever asks again is
            # sent there.
            raise make_error("LEASE_HELD", error.message, _HELD_SECONDS) from error

    async def _hand_over(
        self, resident: Resident, error: TreadleError, then: Callable[[], Awaitable[None]] | None
    ) -> None:
        resident.draining = True
        resident.announce()
        try:
            async with asyncio.timeout(min(HAND_OVER_SECONDS, self._leave_by - time.monotonic())):
                await resident.wait_until(lambda: not resident.busy)
                if resident.order.boundary_seq > resident.snapshot_seq:
                    await self.snapshots.request(resident)
                await self._writer.flush(resident.name)
        except TimeoutError:
            log.warning("hand_over_slow", run=resident.name)
        except TreadleError as lost:
            log.warning("hand_over_failed", run=resident.name, reason=lost.reason)
        # Given back before the streams end, so that who connects again finds the run free. What was not flushed is
        # written by nobody: its clients send it again.
        self._writer.close(resident.name)
        self._loop.remove(resident.name)
        failpoints.reach("trainer.leaving")
        with suppress(TreadleError), failpoints.around("trainer.release"):
            await self._store.release(resident.name, resident.facts.epoch)
        if then is not None:
            await then()
        await self._close(resident, error)
        log.info("run_left", run=resident.name, epoch=resident.facts.epoch, reason=error.reason)

    async def _close(self, resident: Resident, error: TreadleError) -> None:
        """Drops a run from memory; what it had not written stays unwritten."""
        resident.close(error)
        counters.LEFT.labels(error.reason).inc()
        self._writer.close(resident.name)
        self._loop.remove(resident.name)
        if self._residents.get(resident.name) is resident:
            del self._residents[resident.name]
        await self._executor.drop(resident.name)

    def _lose(self, resident: Resident, reason: str) -> None:
        """Another worker has the run, or it is gone: nothing of it may be used any more."""
        log.warning("run_lost", run=resident.name, epoch=resident.facts.epoch, reason=reason)
        if reason == "RUN_NOT_FOUND":
            error = make_error("RUN_NOT_FOUND", f"{resident.name} was deleted")
        else:
            error = make_error(
                "WORKER_LOST", f"{resident.name} is on another trainer now; connect again and go on", 0.2
            )
        if resident.name in self._leaving:
            # The hand-over under way must not wait for writes that nobody will make any more.
            resident.close(error)
        else:
            task = self._leaving[resident.name] = asyncio.create_task(self._close(resident, error))
            task.add_done_callback(lambda _: self._leaving.pop(resident.name, None))

    def _written(self, written: Written) -> None:
        resident = self._residents.get(written.run)
        if resident is not None:
            resident.written(written)

    def _refused(self, run: str, error: types_pb2.OperationError) -> None:
        resident = self._residents.get(run)
        if resident is not None:
            self._lose(resident, error.reason)

    def _stepped(self, resident: Resident, step: int) -> None:
        self.snapshots.after_step(resident, step)

    async def _keep_leases(self) -> None:
        while True:
            await asyncio.sleep(self.settings.lease_seconds / 3)
            try:
                await self._renew()
            except TreadleError as error:
                log.warning("renewal_failed", reason=error.reason, message=error.message)

    async def _renew(self) -> None:
        """Extends the leases, and drops the runs whose lease is not held any more; raises what the store answers."""
        asked, until = self.residents, time.monotonic() + self.settings.lease_seconds
        held = await self._store.renew(self.settings.worker, self.settings.lease_seconds)
        for resident in asked:
            if held.get(resident.name) == resident.facts.epoch:
                resident.lease_until = until
            elif resident.closed is None:
                self._lose(resident, "STALE_LEASE")

    async def _tidy(self) -> None:
        """Parks runs that were not used for a moment, and hands back those that nobody wants any more."""
        while True:
            await asyncio.sleep(_HOUSEKEEPING_SECONDS)
            self._residency.park_idle(self.settings.park_seconds)
            for resident in self._idle(self.settings.idle_seconds):
                await self.evict(resident.name)
            refused = self._budgets.tidy()
            if refused:
                # Without work nothing is written, and without a write nobody would hear of a raised quota.
                with suppress(TreadleError):
                    self._budgets.learn(await self._store.get_budgets(refused[:_ASKED_AT_ONCE]))

    async def _make_room(self) -> None:
        idle = self._idle(0.0)
        for resident in idle[: max(0, len(self._residents) + 1 - self.settings.max_resident_runs)]:
            await self.evict(resident.name)

    def _idle(self, seconds: float) -> list[Resident]:
        """Returns runs without stream and work for so long, the longest idle first."""
        until = time.monotonic() - seconds
        idle = [run for run in self.residents if not run.num_streams and not len(run.order) and run.last_used <= until]
        return sorted(idle, key=lambda run: run.last_used)


async def _watched(work: Callable[[], Coroutine[Any, Any, None]], on_crash: Callable[[BaseException], None]) -> None:
    try:
        await work()
    except asyncio.CancelledError:
        raise
    except Exception as error:
        # A background loop's outermost guard: without it the process would live on as an empty shell.
        log.exception("background_loop_failed", exc_info=error)
        on_crash(error)
