"""Revisions of one base from the adapter store into memory: looked up, fetched or mapped, checked, read.

Reading happens beside the decoder, never on its thread. Knows nothing of who wants a revision.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from treadle.errors import TreadleError, make_error
from treadle.names import parse_adapter
from treadle.v1 import adapters_pb2
from treadle_engine.base_model import KnownBase
from treadle_engine.errors import EngineError
from treadle_engine.lora import AdapterWeights
from treadle_engine.peft_format import CONFIG_FILE, WEIGHTS_FILE, from_files
from treadle_engine.spare_buffers import SpareBuffers
from treadle_sampler.adapter_cache import Found
from treadle_sampler.arrivals import Arrivals, read_checked
from treadle_service.logs import get_logger
from treadle_service.store_client import KnownBlob, StoreClient

_QUIET_SECONDS: Final = 0.05
_MOST_SPARE_BYTES: Final = 2**26
log = get_logger(__name__)


class StoreSource:
    """Revisions of one base; keeps `delta_bytes` of their files to fetch the next ones as differences."""

    def __init__(
        self, store: StoreClient, base: KnownBase, delta_bytes: int = 0, max_arriving_bytes: int = 2**30
    ) -> None:
        """At most `max_arriving_bytes` of files are read before they are published."""
        self.store, self.base = store, base
        self._spare = SpareBuffers(_MOST_SPARE_BYTES)
        self.arrivals = Arrivals(base, store.incoming.path_of, store.blob_file, self._spare, max_arriving_bytes)
        self._delta_bytes = delta_bytes
        self._preparing: asyncio.Task[None] | None = None
        self._kept: OrderedDict[str, KnownBlob] = OrderedDict()

    async def lookup(self, name: str) -> Found:
        """Returns the revision's files; MODEL_NOT_FOUND when there is no such revision of this base."""
        return found_from(await self._adapter(name))

    async def check_public(self, name: str) -> None:
        """Raises the same MODEL_NOT_FOUND unless every tenant may read the revision now."""
        if not (await self._adapter(name)).public:
            raise model_not_found(name, self.base.info.name)

    async def _adapter(self, name: str) -> adapters_pb2.Adapter:
        try:
            # Asked once: what is in memory goes on serving at once while the store is away.
            adapter = await self.store.lookup_adapter(name, tries=1)
        except TreadleError as error:
            if error.reason == "ADAPTER_NOT_FOUND":
                raise model_not_found(name, self.base.info.name) from error
            raise
        if adapter.base != self.base.info.name:
            raise model_not_found(name, self.base.info.name)
        return adapter

    async def load(self, found: Found) -> AdapterWeights:
        """Fetches and reads a revision; CHECKSUM_MISMATCH, BAD_ADAPTER_FILE, INCOMPATIBLE_ADAPTER."""
        started = time.monotonic()
        received = self.store.num_received_bytes
        try:
            weights = await self.arrivals.take(str(parse_adapter(found.name).run_name), found.files)
            fetched = time.monotonic()
            arrived = weights is not None
            if weights is None:
                contents = await asyncio.gather(*(self._fetch(found.name, *file) for file in found.files))
                fetched = time.monotonic()
                files = {path: content for (path, _), content in zip(found.files, contents, strict=True)}
                weights = await self._read(files, dict(found.files))
        except EngineError as error:
            raise make_error(error.reason, error.message) from error
        log.info(
            "revision_loaded",
            name=found.name,
            num_bytes=weights.num_bytes,
            received_bytes=self.store.num_received_bytes - received,
            arrived=arrived,
            fetch_seconds=fetched - started,
            read_seconds=time.monotonic() - fetched,
        )
        self._prepare(weights)
        return weights

    def _prepare(self, weights: AdapterWeights) -> None:
        """Has buffers like those of the last revision ready for the next, made once those who wait have this one."""
        lengths, on_cpu = weights.buffer_lengths, weights.flat.device.type == "cpu"

        async def prepare() -> None:
            await asyncio.sleep(_QUIET_SECONDS)
            for length in lengths:
                await asyncio.to_thread(self._spare.prepare, length)

        if on_cpu and (self._preparing is None or self._preparing.done()):
            self._preparing = asyncio.create_task(prepare())

    async def _read(self, files: dict[str, bytes | Path], addresses: Mapping[str, str]) -> AdapterWeights:
        """Reads an adapter; weights in a file are checked meanwhile, and fetched anew if they were damaged."""
        config, path = files.get(CONFIG_FILE), files.get(WEIGHTS_FILE)
        if isinstance(path, Path) and config is not None:
            config = config if isinstance(config, bytes) else await asyncio.to_thread(config.read_bytes)
            with contextlib.suppress(OSError):
                sha256 = addresses[WEIGHTS_FILE]
                weights = await asyncio.to_thread(read_checked, self.base, config, path, sha256, self._spare)
                if weights is not None:
                    return weights
            files = {CONFIG_FILE: config, WEIGHTS_FILE: await self.store.get_blob(addresses[WEIGHTS_FILE])}
        return await asyncio.to_thread(from_files, self.base, files, self._spare)

    async def _fetch(self, name: str, path: str, sha256: str) -> bytes | Path:
        if path != WEIGHTS_FILE:
            return await self.store.get_file(sha256)
        if not self._delta_bytes:
            return await self.store.get_file(sha256, verify=False)
        run = str(parse_adapter(name).run_name)
        known = self._kept.get(run)
        try:
            content = await self.store.get_file(sha256, known, verify=False)
        except TreadleError as error:
            if known is None or error.reason != "CHECKSUM_MISMATCH":
                raise
            content = await self.store.get_file(sha256, verify=False)
        if isinstance(content, bytes):
            self._keep(run, KnownBlob(sha256, content))
        return content

    def _keep(self, run: str, known: KnownBlob) -> None:
        self._kept[run] = known
        self._kept.move_to_end(run)
        while self._kept and sum(len(kept.content) for kept in self._kept.values()) > self._delta_bytes:
            self._kept.popitem(last=False)


def found_from(adapter: adapters_pb2.Adapter) -> Found:
    """Returns the files that sampling needs."""
    files = ((file.path, file.sha256) for file in adapter.files if file.path in (CONFIG_FILE, WEIGHTS_FILE))
    return Found(adapter.name, tuple(sorted(files)))


def model_not_found(name: str, base: str) -> TreadleError:
    """Returns the one answer for what is absent, not the caller's, or of another base."""
    return make_error(
        "MODEL_NOT_FOUND",
        f"there is no model {name[:200]!r} here; give the base {base!r} or the full name of one of your revisions",
    )
