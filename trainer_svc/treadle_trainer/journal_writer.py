"""Group commit: the operations and results of all resident runs, written to the store in one transaction at a time.

While one write is under way the next gathers. Within a run operations are written in order, and a result never
before its operation. A store that is away is asked again until it answers; nothing is lost meanwhile, since nobody
was told. Knows nothing of what operations do.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from treadle.errors import TreadleError
from treadle.internal.v1 import journal_pb2, usage_pb2
from treadle.v1 import types_pb2
from treadle_service import failpoints
from treadle_service.logs import get_logger
from treadle_trainer import counters
from treadle_trainer.journal_client import JournalClient

MAX_INLINE_BYTES: Final = 2**20
"""Longer operations go into a blob of their own."""
_MAX_WRITE_BYTES: Final = 3 * 2**20 - 2**16
_OVERHEAD_BYTES: Final = 96
_PAUSE_SECONDS: Final = 0.2
log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Written:
    """What a write made durable for one run; None where it held nothing of the kind."""

    run: str
    appended_seq: int | None
    committed_seq: int | None


@dataclass(slots=True)
class _Pending:
    """What one run has to write."""

    epoch: int
    appended_seq: int
    appends: deque[journal_pb2.JournalAppend] = field(default_factory=deque)
    uploads: dict[int, asyncio.Task[str]] = field(default_factory=dict)
    commits: deque[journal_pb2.JournalCommit] = field(default_factory=deque)
    acked_seq: int = 0
    """A new acknowledgement, 0 for none."""

    @property
    def empty(self) -> bool:
        return not (self.appends or self.commits or self.acked_seq)


@dataclass(slots=True)
class _Batch:
    """One write on its way: how much of each run's queues it holds."""

    entries: list[journal_pb2.JournalEntry] = field(default_factory=list)
    room: int = _MAX_WRITE_BYTES

    def take(self, num_bytes: int) -> bool:
        """Reserves room if there is enough; what is longer than an empty write was refused long before."""
        if num_bytes > self.room:
            return False
        self.room -= num_bytes
        return True


class JournalWriter:
    """Writes for all runs; `run_forever` must be running."""

    def __init__(
        self,
        store: JournalClient,
        on_written: Callable[[Written], None],
        on_refused: Callable[[str, types_pb2.OperationError], None],
        on_budgets: Callable[[Sequence[usage_pb2.Budget]], None],
    ) -> None:
        self._on_budgets = on_budgets
        self._store = store
        self._on_written, self._on_refused = on_written, on_refused
        self._pending: dict[str, _Pending] = {}
        self._wake = asyncio.Event()
        self._moved = asyncio.Event()

    def open(self, run: str, epoch: int, appended_seq: int) -> None:
        """Begins to write for a run whose operations up to `appended_seq` are in the journal."""
        self._pending[run] = _Pending(epoch, appended_seq)

    def close(self, run: str) -> None:
        """Forgets what a run still had to write."""
        pending = self._pending.pop(run, None)
        for upload in pending.uploads.values() if pending else ():
            upload.cancel()
        self._announce()

    def append(self, run: str, seq: int, digest: int, payload: bytes) -> None:
        """Queues an operation, the one after the last."""
        pending = self._pending[run]
        entry = journal_pb2.JournalAppend(seq=seq, digest=digest)
        if len(payload) > MAX_INLINE_BYTES:
            upload = asyncio.create_task(self._upload(payload))
            upload.add_done_callback(lambda _: self._wake.set())
            pending.uploads[seq] = upload
        else:
            entry.payload = payload
        pending.appends.append(entry)
        self._wake.set()

    def commit(self, run: str, commit: journal_pb2.JournalCommit) -> None:
        """Queues a result, the one after the last, with what it cost; nothing for a run that is closed."""
        if run in self._pending:
            self._pending[run].commits.append(commit)
            self._wake.set()

    def acknowledge(self, run: str, seq: int) -> None:
        """Queues the news that results up to `seq` were delivered; goes with the next write."""
        if run in self._pending:
            self._pending[run].acked_seq = max(self._pending[run].acked_seq, seq)
            self._wake.set()

    async def flush(self, run: str) -> None:
        """Waits until the run has nothing left to write, or is closed."""
        while run in self._pending and not self._pending[run].empty:
            await self._moved.wait()

    async def run_forever(self) -> None:
        """Writes until cancelled."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while (batch := self._gather()).entries:
                if await self._write(batch):
                    self._announce()
                else:
                    await asyncio.sleep(_PAUSE_SECONDS)

    def _announce(self) -> None:
        """Wakes whoever waits for a run to have nothing left to write."""
        moved, self._moved = self._moved, asyncio.Event()
        moved.set()

    def _gather(self) -> _Batch:
        batch = _Batch()
        # The run that was served first goes last next time, so that one with much to write delays nobody.
        for run, pending in list(self._pending.items()):
            if pending.empty:
                continue
            entry = journal_pb2.JournalEntry(run=run, epoch=pending.epoch, acked_seq=pending.acked_seq)
            if not batch.take(_OVERHEAD_BYTES + len(run)):
                break
            batch.entries.append(entry)
            self._fill(entry, pending, batch)
            if entry.appends or entry.commits or entry.acked_seq:
                self._pending[run] = self._pending.pop(run)
            else:
                batch.entries.pop()
        return batch

    def _fill(self, entry: journal_pb2.JournalEntry, pending: _Pending, batch: _Batch) -> None:
        last = pending.appended_seq
        for append in pending.appends:
            upload = pending.uploads.get(append.seq)
            if upload is not None:
                if not upload.done():
                    break
                append.payload_sha256 = upload.result()
            if not batch.take(_OVERHEAD_BYTES + len(append.payload)):
                break
            entry.appends.append(append)
            last = append.seq
        for commit in pending.commits:
            if commit.seq > last or not batch.take(_OVERHEAD_BYTES + commit.ByteSize()):
                break
            entry.commits.append(commit)

    async def _upload(self, payload: bytes) -> str:
        while True:
            try:
                return await self._store.put_blob(payload)
            except TreadleError as error:
                log.warning("upload_failed", reason=error.reason, message=error.message)
                await asyncio.sleep(_PAUSE_SECONDS)

    async def _write(self, batch: _Batch) -> bool:
        try:
            with failpoints.around("trainer.write_journal"), counters.JOURNAL_WRITE.time():
                response = await self._store.write_journal(batch.entries)
        except TreadleError as error:
            counters.JOURNAL_FAILURES.inc()
            log.warning("journal_write_failed", reason=error.reason, message=error.message)
            return False
        counters.JOURNAL_ENTRIES.observe(len(batch.entries))
        self._on_budgets(response.budgets)
        for entry, refusal in zip(batch.entries, response.errors, strict=True):
            pending = self._pending.get(entry.run)
            if pending is None or pending.epoch != entry.epoch:
                continue
            if refusal.reason:
                self.close(entry.run)
                self._on_refused(entry.run, refusal)
            else:
                self._settle(entry, pending)
        return True

    def _settle(self, entry: journal_pb2.JournalEntry, pending: _Pending) -> None:
        for append in entry.appends:
            pending.appends.popleft()
            pending.uploads.pop(append.seq, None)
            pending.appended_seq = append.seq
        for _ in entry.commits:
            pending.commits.popleft()
        if pending.acked_seq == entry.acked_seq:
            pending.acked_seq = 0
        self._on_written(
            Written(
                entry.run,
                entry.appends[-1].seq if entry.appends else None,
                entry.commits[-1].seq if entry.commits else None,
            )
        )
