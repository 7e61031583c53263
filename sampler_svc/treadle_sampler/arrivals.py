"""Revisions read while their files are still being made durable, so that they are there when they are published.

What is read here has no name: it is handed out only for a published revision with the same content. At most one of a
run is kept, the newest, and all together are bounded. Knows nothing of the store's news.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

from treadle.internal.v1 import revisions_pb2
from treadle_engine.base_model import KnownBase
from treadle_engine.errors import EngineError
from treadle_engine.lora import AdapterWeights
from treadle_engine.peft_format import CONFIG_FILE, WEIGHTS_FILE, from_files
from treadle_engine.spare_buffers import SpareBuffers
from treadle_service.logs import get_logger

log = get_logger(__name__)
Files = Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class ReadFile:
    """What a file of weights holds: the sha256 of its bytes, and the adapter or what is wrong with it."""

    sha256: str
    outcome: AdapterWeights | EngineError

    @property
    def weights(self) -> AdapterWeights:
        """The adapter; raises what is wrong with it."""
        if isinstance(self.outcome, EngineError):
            raise self.outcome
        return self.outcome


def read_file(base: KnownBase, config: bytes, path: Path, spare: SpareBuffers, *, on_two_threads: bool) -> ReadFile:
    """Reads an adapter's mapped weights and hashes them; blocks. OSError when there is no such file."""
    # Opened once: its name may change before both are done.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    files: dict[str, bytes | Path] = {CONFIG_FILE: config, WEIGHTS_FILE: Path(f"/dev/fd/{descriptor}")}
    with os.fdopen(descriptor, "rb") as file:
        if not on_two_threads:
            return ReadFile(_digest(file), _read(base, files, spare))
        with ThreadPoolExecutor(1) as pool:
            digest = pool.submit(_digest, file)
            outcome = _read(base, files, spare)
            return ReadFile(digest.result(), outcome)


def _digest(file: BufferedReader) -> str:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _read(base: KnownBase, files: Mapping[str, bytes | Path], spare: SpareBuffers) -> AdapterWeights | EngineError:
    try:
        return from_files(base, files, spare)
    except EngineError as error:
        return error


@dataclass(frozen=True, slots=True)
class _Arrival:
    config_sha256: str
    size: int
    task: asyncio.Task[ReadFile | None]


class Arrivals:
    """Revisions on their way, by run; for one event loop."""

    def __init__(
        self, base: KnownBase, place_of: Callable[[str], Path | None], spare: SpareBuffers, max_bytes: int
    ) -> None:
        """`place_of` gives where a file on its way lies, None where that is out of reach.

        All together hold at most `max_bytes` of files.
        """
        self._base, self._place_of, self._spare, self._max_bytes = base, place_of, spare, max_bytes
        self._arrivals: OrderedDict[str, _Arrival] = OrderedDict()

    def begin(self, revision: revisions_pb2.RevisionArriving) -> None:
        """Starts to read a revision that was announced, in place of an older one of its run."""
        path = self._place_of(revision.file)
        self._arrivals.pop(revision.run, None)
        if path is None or revision.size > self._max_bytes:
            return
        task = asyncio.create_task(self._read(revision, path))
        digest = hashlib.sha256(revision.config).hexdigest()
        self._arrivals[revision.run] = _Arrival(digest, revision.size, task)
        while sum(arrival.size for arrival in self._arrivals.values()) > self._max_bytes:
            self._arrivals.popitem(last=False)

    async def take(self, run: str, files: Files) -> AdapterWeights | None:
        """Returns what was read of a run, and forgets it; None unless it is whole and of exactly these files."""
        arrival = self._arrivals.pop(run, None)
        if arrival is None:
            return None
        read = await asyncio.shield(arrival.task)
        if read is None or dict(files) != {CONFIG_FILE: arrival.config_sha256, WEIGHTS_FILE: read.sha256}:
            return None
        return read.weights

    async def _read(self, revision: revisions_pb2.RevisionArriving, path: Path) -> ReadFile | None:
        began = time.monotonic()
        try:
            # On one: the store, which makes the file durable for whoever waits, wants a core too.
            read = await asyncio.to_thread(
                read_file, self._base, revision.config, path, self._spare, on_two_threads=False
            )
        except OSError as error:
            # It has become a blob already, or its trainer gave it up.
            log.info("arrival_missed", run=revision.run, cause=str(error))
            return None
        log.info("revision_arrived", run=revision.run, num_bytes=revision.size, read_seconds=time.monotonic() - began)
        return read
