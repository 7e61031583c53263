"""What a sampler does, without gRPC: finds the model of a name, draws from it, tells the store that it lives.

Knows the decoder through EngineLoop and revisions through AdapterCache.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace

from treadle.errors import TreadleError, make_error
from treadle.names import is_adapter, parse_adapter
from treadle.v1 import adapters_pb2, admin_pb2
from treadle_engine.base_model import BaseInfo
from treadle_engine.decode_base import DecodeBase
from treadle_engine.decode_requests import DecodeEvent, FailedEvent, SampleRequest
from treadle_engine.errors import EngineError
from treadle_engine.lora import AdapterWeights
from treadle_engine.peft_format import CONFIG_FILE, WEIGHTS_FILE, from_files
from treadle_sampler.adapter_cache import AdapterCache
from treadle_sampler.engine_loop import EngineLoop
from treadle_sampler.settings import SamplerSettings
from treadle_service.logs import get_logger
from treadle_service.principal import INTERNAL_SCOPE, Principal
from treadle_service.registration import Registration
from treadle_service.store_client import StoreClient

log = get_logger(__name__)


@dataclass(frozen=True)
class StoreSource:
    """Revisions of one base, from the adapter store into memory."""

    store: StoreClient
    engine: EngineLoop
    base: DecodeBase

    async def version(self, name: str) -> str:
        """Returns the hashes of the revision's files; MODEL_NOT_FOUND when there is no such revision of this base."""
        adapter = await self._lookup(name)
        return " ".join(sorted(file.sha256 for file in adapter.files))

    async def load(self, name: str) -> AdapterWeights:
        """Fetches and reads a revision."""
        started = time.monotonic()
        adapter = await self._lookup(name)
        wanted = [file for file in adapter.files if file.path in (CONFIG_FILE, WEIGHTS_FILE)]
        contents = await asyncio.gather(*(self.store.get_file(file.sha256) for file in wanted))
        fetched = time.monotonic()
        files = {file.path: content for file, content in zip(wanted, contents, strict=True)}
        weights = await self.engine.call(lambda: from_files(self.base, files))
        log.info(
            "revision_loaded",
            name=name,
            num_bytes=weights.num_bytes,
            fetch_seconds=fetched - started,
            read_seconds=time.monotonic() - fetched,
        )
        return weights

    async def _lookup(self, name: str) -> adapters_pb2.Adapter:
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


class Sampler:
    """One base on one device and the revisions that are sampled from it."""

    def __init__(
        self, settings: SamplerSettings, engine: EngineLoop, base: DecodeBase, store: StoreClient, address: str
    ) -> None:
        self.engine = engine
        self.draining = False
        self._info: BaseInfo = base.info
        worker = admin_pb2.Worker(worker=settings.worker, kind=admin_pb2.WORKER_KIND_SAMPLER, address=address)
        self.registration = Registration(store, worker, base.info, settings.heartbeat_seconds, self._load_now)
        self.cache: AdapterCache[AdapterWeights] = AdapterCache(
            StoreSource(store, engine, base),
            time.monotonic,
            max_entries=settings.max_cached_adapters,
            max_bytes=settings.max_cached_bytes,
            lookup_seconds=settings.lookup_seconds,
        )

    @asynccontextmanager
    async def model(self, name: str, principal: Principal) -> AsyncIterator[AdapterWeights | None]:
        """Gives the adapter of a model's name, None for the base; MODEL_NOT_FOUND for all that is not the caller's."""
        if name == self._info.name:
            yield None
            return
        if not is_adapter(name):
            raise model_not_found(name, self._info.name)
        parsed = parse_adapter(name)
        trusted = INTERNAL_SCOPE in principal.scopes and not principal.tenant
        if parsed.kind != "revisions" or not (trusted or parsed.tenant == principal.tenant):
            raise model_not_found(name, self._info.name)
        async with self.cache.lease(name) as weights:
            yield weights

    async def run(self, model: str, principal: Principal, request: SampleRequest) -> AsyncGenerator[DecodeEvent, None]:
        """Yields the events of a request to a model; raises TreadleError."""
        if self.draining:
            raise make_error("DRAINING", "this sampler takes no new work; try again")
        try:
            async with self.model(model, principal) as weights:
                owned = replace(request, weights=weights, owner=principal.tenant)
                async with aclosing(self.engine.sample(owned)) as events:
                    async for event in events:
                        if isinstance(event, FailedEvent):
                            raise event.error
                        yield event
        except EngineError as error:
            raise make_error(error.reason, error.message) from error

    async def drain(self) -> None:
        """Takes no new work, and tells the store."""
        self.draining = True
        await self.registration.end()

    def _load_now(self) -> tuple[int, int, bool]:
        return len(self.cache.names), self.engine.num_requests, self.draining


def model_not_found(name: str, base: str) -> TreadleError:
    """Returns the one answer for what is absent, not the caller's, or of another base."""
    return make_error(
        "MODEL_NOT_FOUND",
        f"there is no model {name[:200]!r} here; give the base {base!r} or the full name of one of your revisions",
    )
