"""The operations that save and load adapters: device work and transfers, both beside the passes.

A saved adapter is its files in the blob store and one row that names them; the row is written only after the
operation itself is durable, and writing it again after a crash changes nothing. Knows neither order nor streams.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Final

from treadle import names
from treadle.errors import TreadleError, make_error
from treadle.internal.v1 import revisions_pb2
from treadle.v1 import adapters_pb2, training_pb2
from treadle_engine.peft_format import CONFIG_FILE, WEIGHTS_FILE
from treadle_service import failpoints
from treadle_service.logs import get_logger
from treadle_service.store_client import persist
from treadle_trainer import operations
from treadle_trainer.device import OPTIMIZER_FILE, Device
from treadle_trainer.device_loop import DeviceLoop
from treadle_trainer.executor import Executor
from treadle_trainer.journal_client import JournalClient
from treadle_trainer.resident import Resident, RunOp
from treadle_trainer.runs import LOAD_STATE
from treadle_trainer.snapshots import Snapshots

SAVE_STATE: Final = "save_state"
SAVE_WEIGHTS: Final = "save_weights_for_sampler"
QUIET_SECONDS: Final = 0.05
log = get_logger(__name__)


class Adapters:
    """Runs save_state, save_weights_for_sampler and load_state."""

    def __init__(self, executor: Executor, loop: DeviceLoop, store: JournalClient, snapshots: Snapshots) -> None:
        """Registers itself with the device loop as the starter of its kinds."""
        self._executor, self._loop, self._store, self._snapshots = executor, loop, store, snapshots
        loop.starters[SAVE_STATE] = self._start_save
        loop.starters[SAVE_WEIGHTS] = self._start_save
        loop.starters[LOAD_STATE] = lambda resident, op: loop.spawn(self._load(resident, op))

    async def fetch(
        self, name: str, base: str, *, with_optimizer: bool, reader: str | None = None
    ) -> dict[str, bytes | Path]:
        """Returns a saved adapter's files by name; ADAPTER_NOT_FOUND, INCOMPATIBLE_ADAPTER, NO_OPTIMIZER_STATE.

        With `reader`, a tenant, it must be that tenant's or public.
        """
        adapter = await self._store.lookup_adapter(name)
        if reader not in (None, names.parse_adapter(name).tenant) and not adapter.public:
            raise make_error("ADAPTER_NOT_FOUND", f"there is no adapter {name!r}")
        if adapter.base != base:
            raise make_error("INCOMPATIBLE_ADAPTER", f"{name} was trained on {adapter.base!r}, the run is on {base!r}")
        present = {file.path: file.sha256 for file in adapter.files}
        if with_optimizer and OPTIMIZER_FILE not in present:
            raise make_error(
                "NO_OPTIMIZER_STATE", f"{name} is a revision without optimizer state; load a checkpoint, or without it"
            )
        if not with_optimizer:
            present.pop(OPTIMIZER_FILE, None)
        return {path: await self._store.get_file(sha256) for path, sha256 in present.items()}

    def _start_save(self, resident: Resident, op: RunOp) -> None:
        async def save() -> None:
            began = time.monotonic()
            try:
                _check_id(op)
                files, step = await self._executor.beside(
                    Device.export,
                    resident.name,
                    with_optimizer=op.kind == SAVE_STATE,
                    into=self._store.new_file(spare=True),
                )
            except TreadleError as error:
                self._loop.conclude(resident, op, error)
                return
            await self._store_adapter(resident, op, files, step, time.monotonic() - began)

        self._loop.spawn(save())

    async def _store_adapter(
        self, resident: Resident, op: RunOp, files: dict[str, bytes | Path], step: int, export_seconds: float
    ) -> None:
        began = time.monotonic()
        try:
            adapter = adapters_pb2.Adapter(base=resident.facts.base, lora=resident.facts.lora, step=step)
            if op.kind == SAVE_WEIGHTS:
                self._announce(resident, files)
            with failpoints.around("trainer.put_adapter"):
                # Files first, which are long.
                ordered = sorted(files.items(), key=lambda file: isinstance(file[1], bytes))
                stored_files = await asyncio.gather(*(self._put(resident, *file) for file in ordered))
            adapter.files.extend(sorted(stored_files, key=lambda file: file.path))
            adapter.unnamed = op.kind == SAVE_WEIGHTS and not op.work.operation.save_weights_for_sampler.revision_id
            adapter.name = _adapter_name(resident.name, op, stored_files, step)
            adapter.created.FromNanoseconds(time.time_ns())
            wanted = getattr(op.work.operation, op.kind)
            adapter.metadata.update(wanted.metadata)
            if wanted.HasField("ttl"):
                adapter.expires.FromNanoseconds(time.time_ns() + wanted.ttl.ToNanoseconds())
            stored = time.monotonic()
            # An adapter must not outlive an operation that was never accepted.
            await resident.wait_until(lambda: resident.results.appended_seq >= op.seq)
            with failpoints.around("trainer.record_adapter"):
                overwrite = op.kind == SAVE_STATE and op.work.operation.save_state.overwrite
                record = partial(
                    self._store.record_adapter,
                    resident.name,
                    resident.facts.epoch,
                    op.seq,
                    adapter,
                    overwrite=overwrite,
                )
                await persist(record, resident.is_open)
        except TreadleError as error:
            self._loop.conclude(resident, op, error)
            return
        result = training_pb2.OperationResult()
        if op.kind == SAVE_STATE:
            result.save_state.checkpoint = adapter.name
        else:
            result.save_weights_for_sampler.revision = adapter.name
        log.info(
            "revision_saved",
            name=adapter.name,
            num_bytes=sum(file.size for file in adapter.files),
            export_seconds=export_seconds,
            store_seconds=stored - began,
            record_seconds=time.monotonic() - stored,
        )
        self._loop.conclude(resident, op, result)
        self._loop.spawn(self._prepare(sum(file.size for file in adapter.files if file.path == WEIGHTS_FILE)))

    async def _prepare(self, size: int) -> None:
        """Makes a file for the next revision to be written into, once those who wait for this one have it."""
        await asyncio.sleep(QUIET_SECONDS)
        await asyncio.to_thread(self._store.incoming.prepare, size)

    def _announce(self, resident: Resident, files: dict[str, bytes | Path]) -> None:
        """Has samplers that share the store's folder read a revision while it is made durable."""
        weights, config = files[WEIGHTS_FILE], files[CONFIG_FILE]
        if isinstance(weights, bytes) or not isinstance(config, bytes):
            return
        revision = revisions_pb2.RevisionArriving(
            run=resident.name, file=weights.name, size=weights.stat().st_size, config=config
        )

        async def announce() -> None:
            # Whoever does not hear of it reads it when it is published.
            with contextlib.suppress(TreadleError):
                await self._store.announce_revision(resident.facts.base, revision)

        self._loop.spawn(announce())

    async def _put(self, resident: Resident, path: str, content: bytes | Path) -> adapters_pb2.AdapterFile:
        if isinstance(content, bytes):
            sha256 = await persist(partial(self._store.put_blob, content), resident.is_open)
            return adapters_pb2.AdapterFile(path=path, size=len(content), sha256=sha256)
        size = content.stat().st_size
        sha256 = await self._store.put_file(content, resident.is_open)
        return adapters_pb2.AdapterFile(path=path, size=size, sha256=sha256)

    async def _load(self, resident: Resident, op: RunOp) -> None:
        wanted = op.work.operation.load_state
        with_optimizer = wanted.with_optimizer
        # What was loaded once is loaded again in a replay, though its owner may have taken it back.
        reader = resident.facts.tenant if op.work.recorded is None else None
        try:
            fetch = partial(
                self.fetch,
                str(names.parse_adapter(wanted.adapter)),
                resident.facts.base,
                with_optimizer=with_optimizer,
                reader=reader,
            )
            files = await persist(fetch, resident.is_open)
            config = operations.lora_config(resident.facts.lora)
            if resident.closed is not None:
                return
            loaded = await self._executor.beside(
                Device.load, resident.name, config, files, with_optimizer=with_optimizer
            )
        except TreadleError as error:
            self._loop.conclude(resident, op, error)
            return
        if resident.closed is not None:
            return
        result = training_pb2.OperationResult()
        result.load_state.step = loaded.step
        self._loop.conclude(resident, op, result, loaded.digest)
        # The adapter may be deleted later: from here on the run must not need it again.
        self._snapshots.request(resident)


def _check_id(op: RunOp) -> None:
    wanted = op.work.operation
    chosen = wanted.save_state.checkpoint_id if op.kind == SAVE_STATE else wanted.save_weights_for_sampler.revision_id
    if chosen:
        names.check_id(chosen)


def _adapter_name(run: str, op: RunOp, files: Sequence[adapters_pb2.AdapterFile], step: int) -> str:
    owner = names.parse_run(run)
    if op.kind == SAVE_STATE:
        return str(owner.adapter("checkpoints", op.work.operation.save_state.checkpoint_id or f"step-{step}"))
    chosen = op.work.operation.save_weights_for_sampler.revision_id
    weights = next(file.sha256 for file in files if file.path == WEIGHTS_FILE)
    content = f"w-{weights[:12]}"
    return str(owner.adapter("revisions", chosen or content))
