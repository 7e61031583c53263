"""Brings a run into memory: claims it, loads its newest snapshot, and queues the journal behind it for replay.

Operations that had finished run again through the ordinary path, marked with their recorded result: it is not
written again, and a recorded failure is not tried again but fails at its turn as it did. The state digest of each
step is compared with the recorded one. Knows nothing of passes or streams.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from treadle import names
from treadle.errors import TreadleError, from_operation_error, make_error
from treadle.internal.v1 import journal_pb2
from treadle.v1 import training_pb2
from treadle_service import failpoints
from treadle_service.budgets import TenantBudgets
from treadle_service.logs import get_logger
from treadle_trainer import counters, operations
from treadle_trainer.device import Device
from treadle_trainer.executor import Executor
from treadle_trainer.journal_client import JournalClient
from treadle_trainer.journal_writer import JournalWriter
from treadle_trainer.resident import OpWork, Prepare, Recorded, Resident, RunFacts
from treadle_trainer.results import ResultLog, StoredResult
from treadle_trainer.runs import Offer, RunOrder

log = get_logger(__name__)


class FetchAdapter(Protocol):
    """How the files of a saved adapter are fetched."""

    async def __call__(self, name: str, base: str, *, with_optimizer: bool) -> dict[str, bytes | Path]:
        """Returns files by name."""
        ...


@dataclass(slots=True)
class _Journal:
    """What RecoverRun streamed."""

    header: journal_pb2.RecoveryHeader
    operations: list[journal_pb2.JournaledOperation] = field(default_factory=list)

    @property
    def snapshot_seq(self) -> int:
        return self.header.snapshot.seq

    @property
    def done_seq(self) -> int:
        """Last operation with a result."""
        return max(
            (op.seq for op in self.operations if op.result), default=max(self.snapshot_seq, self.header.acked_seq)
        )


@dataclass(frozen=True, slots=True)
class Recovery:
    """Loads runs for one trainer."""

    executor: Executor
    store: JournalClient
    writer: JournalWriter
    fetch: FetchAdapter
    prepare: Prepare
    wake: Callable[[], None]
    max_context: int
    base: str
    budgets: TenantBudgets
    marking: set[asyncio.Task[None]] = field(default_factory=set)
    """Runs' divergences on their way to the catalog."""

    async def load(self, name: str, claim: journal_pb2.ClaimRunResponse) -> Resident:
        """Returns a claimed run, ready for the device loop; its journal's tail is in its queue."""
        if claim.run.base != self.base:
            raise make_error("NO_WORKER", f"{name} is on base {claim.run.base!r}; this trainer holds {self.base!r}")
        journal = await self._read(name, claim.lease.epoch)
        num_failed = await self._load_state(name, claim, journal)
        failpoints.reach("trainer.loaded")
        facts = RunFacts(
            name, names.parse_run(name).tenant, claim.run.base, claim.run.lora, claim.lease.epoch, self.max_context
        )
        order: RunOrder[OpWork] = RunOrder(journal.snapshot_seq, num_failed)
        results = ResultLog(journal.header.acked_seq, journal.done_seq, journal.header.last_seq)
        self.writer.open(name, claim.lease.epoch, journal.header.last_seq)
        resident = Resident(
            facts,
            order,
            results,
            writer=self.writer,
            prepare=self.prepare,
            wake=self.wake,
            on_diverged=self._mark_diverged,
            budgets=self.budgets,
        )
        resident.snapshot_sha256 = journal.header.snapshot.sha256
        resident.snapshot_digest = journal.header.snapshot.state_digest
        try:
            for row in journal.operations:
                await self._queue(resident, row, journal.snapshot_seq)
        except TreadleError as error:
            resident.close(error)
            raise
        if claim.run.state == training_pb2.RUN_STATE_DIVERGED:
            resident.diverge(claim.run.divergence.message)
        failpoints.reach("trainer.recovered")
        log.info(
            "run_loaded",
            run=name,
            epoch=claim.lease.epoch,
            snapshot_seq=journal.snapshot_seq,
            replayed=max(0, journal.done_seq - journal.snapshot_seq),
            unfinished=len(order) - max(0, journal.done_seq - journal.snapshot_seq),
        )
        return resident

    def _mark_diverged(self, resident: Resident, found: training_pb2.Divergence) -> None:
        """Tells the catalog; if that fails, the next replay finds the same again."""

        async def mark() -> None:
            try:
                await self.store.mark_diverged(resident.name, resident.facts.epoch, found)
            except TreadleError as error:
                log.warning("mark_failed", run=resident.name, reason=error.reason, message=error.message)

        counters.DIVERGED.inc()
        log.error("run_diverged", run=resident.name, seq=found.seq, message=found.message)
        task = asyncio.create_task(mark())
        self.marking.add(task)
        task.add_done_callback(self.marking.discard)

    async def _read(self, name: str, epoch: int) -> _Journal:
        journal = _Journal(journal_pb2.RecoveryHeader())
        async for frame in self.store.recover(name, epoch):
            if frame.HasField("header"):
                journal.header.CopyFrom(frame.header)
            else:
                journal.operations.append(frame.operation)
        return journal

    async def _load_state(self, name: str, claim: journal_pb2.ClaimRunResponse, journal: _Journal) -> int:
        """Puts the state at the snapshot (or the start) onto the device; returns the failures it carries."""
        config = operations.lora_config(claim.run.lora)
        snapshot = journal.header.snapshot
        if snapshot.sha256:
            data = await self.store.get_file(snapshot.sha256, verify=False)
            return await self.executor.beside(Device.restore, name, config, data, snapshot.state_digest)
        if claim.from_adapter:
            with_optimizer = names.parse_adapter(claim.from_adapter).kind == "checkpoints"
            files = await self.fetch(claim.from_adapter, claim.run.base, with_optimizer=with_optimizer)
            await self.executor.beside(Device.load, name, config, files, with_optimizer=with_optimizer)
        else:
            await self.executor.beside(Device.create, name, config)
        return 0

    async def _queue(self, resident: Resident, row: journal_pb2.JournaledOperation, snapshot_seq: int) -> None:
        recorded: Recorded | None = None
        result = training_pb2.OperationResult.FromString(row.result)
        if row.result:
            failed = result.HasField("error")
            recorded = Recorded(failed, row.state_digest)
            if row.seq > resident.results.acked_seq:
                resident.results.put(row.seq, StoredResult(row.result, failed, stored=True))
        if row.seq <= snapshot_seq:
            resident.order.remember(row.seq, row.digest)
            return
        payload = row.payload or await self.store.get_blob(row.payload_sha256)
        operation = training_pb2.Operation.FromString(payload)
        offer = Offer(
            row.seq,
            row.digest,
            operation.WhichOneof("kind") or "",
            len(payload),
            OpWork(operation, recorded, limited=False),
            None if recorded else operations.timeout_of(operation),
        )
        op = resident.order.restore(offer, time.monotonic())
        if recorded is not None and recorded.failed:
            op.doom = from_operation_error(result.error)
        resident.admit(op)
