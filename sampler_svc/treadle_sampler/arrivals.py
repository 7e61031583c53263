"""Revisions read while their files are still being made durable, so that they are there when they are published.

What is read here has no name: it is handed out only for a published revision whose file is the very one that was read,
which the store hashed before it gave it its address. At most one of a run is kept, the newest, and all together are
bounded. Knows nothing of the store's news.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Final

from treadle.internal.v1 import revisions_pb2
from treadle_engine.base_model import KnownBase
from treadle_engine.errors import EngineError
from treadle_engine.lora import AdapterWeights
from treadle_engine.peft_format import CONFIG_FILE, WEIGHTS_FILE, from_files
from treadle_engine.spare_buffers import SpareBuffers
from treadle_service.logs import get_logger

log = get_logger(__name__)
MAX_ARRIVALS: Final = 64
"""Files open at once; those of revisions that were never published stay among them."""

PathOf = Callable[[str], Path | None]


def read_checked(base: KnownBase, config: bytes, path: Path, sha256: str, spare: SpareBuffers) -> AdapterWeights | None:
    """Reads an adapter's mapped weights, and hashes them at the same time; blocks. None unless they have that sha256.

    Raises OSError when there is no such file, EngineError for what is wrong with the adapter.
    """
    with _open(path) as file, ThreadPoolExecutor(1) as pool:
        digest = pool.submit(lambda: hashlib.file_digest(file, "sha256").hexdigest())
        outcome = _read(base, config, file, spare)
        if digest.result() != sha256:
            return None
    return _whole(outcome)


def _open(path: Path) -> BufferedReader:
    # Opened once: the file's name may change before all is done.
    return os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb")


def _read(base: KnownBase, config: bytes, file: BufferedReader, spare: SpareBuffers) -> AdapterWeights | EngineError:
    try:
        return from_files(base, {CONFIG_FILE: config, WEIGHTS_FILE: Path(f"/dev/fd/{file.fileno()}")}, spare)
    except EngineError as error:
        return error


def _whole(outcome: AdapterWeights | EngineError) -> AdapterWeights:
    if isinstance(outcome, EngineError):
        raise outcome
    return outcome


@dataclass(frozen=True, slots=True)
class _Arrival:
    config_sha256: str
    size: int
    file: BufferedReader
    """Open as long as this is kept, so that no other file can be taken for it."""
    task: asyncio.Task[AdapterWeights | EngineError]

    def end(self) -> None:
        """Closes the file when nobody reads it any more."""
        self.task.add_done_callback(lambda _: self.file.close())


class Arrivals:
    """Revisions on their way, by run; for one event loop."""

    def __init__(
        self, base: KnownBase, incoming_of: PathOf, blob_of: PathOf, spare: SpareBuffers, max_bytes: int
    ) -> None:
        """`incoming_of` gives where a file on its way lies by its name, `blob_of` where a blob does by its sha256.

        None where they are out of reach. All together hold at most `max_bytes` of files.
        """
        self._base, self._spare, self._max_bytes = base, spare, max_bytes
        self._incoming_of, self._blob_of = incoming_of, blob_of
        self._arrivals: OrderedDict[str, _Arrival] = OrderedDict()

    def begin(self, revision: revisions_pb2.RevisionArriving) -> None:
        """Starts to read a revision that was announced, in place of an older one of its run."""
        self._forget(revision.run)
        path = self._incoming_of(revision.file)
        if path is None or revision.size > self._max_bytes:
            return
        try:
            file = _open(path)
        except OSError as error:
            # It has become a blob already, or its trainer gave it up.
            log.info("arrival_missed", run=revision.run, cause=str(error))
            return
        digest = hashlib.sha256(revision.config).hexdigest()
        task = asyncio.create_task(self._read(revision, file))
        self._arrivals[revision.run] = _Arrival(digest, revision.size, file, task)
        kept = self._arrivals
        while len(kept) > MAX_ARRIVALS or sum(arrival.size for arrival in kept.values()) > self._max_bytes:
            self._forget(next(iter(kept)))

    async def take(self, run: str, files: Sequence[tuple[str, str]]) -> AdapterWeights | None:
        """Returns what was read of a run, once; None unless it is of exactly these files. Raises EngineError."""
        arrival = self._arrivals.get(run)
        addresses = dict(files)
        if arrival is None or addresses.keys() != {CONFIG_FILE, WEIGHTS_FILE}:
            return None
        blob = self._blob_of(addresses[WEIGHTS_FILE])
        # The store hashed that very file: hashing the same pages again would say the same.
        same = blob is not None and _is_at(arrival.file, blob)
        if not same or arrival.config_sha256 != addresses[CONFIG_FILE]:
            return None
        self._forget(run)
        return _whole(await asyncio.shield(arrival.task))

    def _forget(self, run: str) -> None:
        arrival = self._arrivals.pop(run, None)
        if arrival is not None:
            arrival.end()

    async def _read(
        self, revision: revisions_pb2.RevisionArriving, file: BufferedReader
    ) -> AdapterWeights | EngineError:
        began = time.monotonic()
        outcome = await asyncio.to_thread(_read, self._base, revision.config, file, self._spare)
        log.info("revision_arrived", run=revision.run, num_bytes=revision.size, read_seconds=time.monotonic() - began)
        return outcome


def _is_at(file: BufferedReader, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.lstat())
    except OSError:
        return False
