"""What a sampler does, without gRPC: finds the model of a name, draws from it, tells the store that it lives.

Knows the decoder through EngineLoop and revisions through AdapterCache.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from typing import Final

from treadle.errors import make_error
from treadle.names import is_adapter, parse_adapter
from treadle.v1 import admin_pb2
from treadle_engine.base_model import BaseInfo, KnownBase
from treadle_engine.decode_requests import DecodeEvent, FailedEvent, SampleRequest, TokenEvent
from treadle_engine.errors import EngineError
from treadle_engine.lora import AdapterWeights
from treadle_sampler.adapter_cache import AdapterCache
from treadle_sampler.engine_loop import EngineLoop
from treadle_sampler.metering import Metering
from treadle_sampler.revision_source import StoreSource, model_not_found
from treadle_sampler.settings import SamplerSettings
from treadle_sampler.tokenizer_source import TokenizerSource
from treadle_sampler.watch import RevisionWatch
from treadle_service.principal import INTERNAL_SCOPE, Principal
from treadle_service.registration import Registration
from treadle_service.store_client import StoreClient

_MAX_SERVED_RUNS: Final = 256


class Sampler:
    """One base on one device and the revisions that are sampled from it."""

    def __init__(
        self, settings: SamplerSettings, engine: EngineLoop, base: KnownBase, store: StoreClient, address: str
    ) -> None:
        self.engine, self.store = engine, store
        self.draining = False
        self._info: BaseInfo = base.info
        self.tokenizer = TokenizerSource(base.info)
        worker = admin_pb2.Worker(worker=settings.worker, kind=admin_pb2.WORKER_KIND_SAMPLER, address=address)
        self.registration = Registration(store, worker, base.info, settings.heartbeat_seconds, self._describe_load)
        self.metering = Metering(store, settings.worker, lambda: engine.trace.busy_seconds)
        self._source = StoreSource(store, base, settings.delta_bytes, settings.max_prefetched_bytes)
        self.cache: AdapterCache[AdapterWeights] = AdapterCache(
            self._source,
            time.monotonic,
            max_entries=settings.max_cached_adapters,
            max_bytes=settings.max_cached_bytes,
            max_unused_bytes=settings.max_prefetched_bytes,
            lookup_seconds=settings.lookup_seconds,
        )
        self._served: OrderedDict[str, None] = OrderedDict()
        self.watch = RevisionWatch(
            store,
            self.cache,
            base.info.name,
            settings.worker,
            settings.prefetch,
            serves=self._served.__contains__,
            arrive=self._source.arrivals.begin,
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
        if parsed.kind != "revisions":
            raise model_not_found(name, self._info.name)
        if not (trusted or parsed.tenant == principal.tenant):
            await self._source.check_public(name)
        self._note_served(str(parsed.run_name))
        async with self.cache.lease(name) as weights:
            yield weights

    async def run(self, model: str, principal: Principal, request: SampleRequest) -> AsyncGenerator[DecodeEvent, None]:
        """Yields the events of a request to a model; raises TreadleError."""
        if self.draining:
            raise make_error("DRAINING", "this sampler takes no new work; try again")
        prompt_tokens = len(request.prompt_T)
        longest = request.params.max_tokens or self._info.max_context
        expected = prompt_tokens + request.num_samples * max(0, min(longest, self._info.max_context - prompt_tokens))
        try:
            async with (
                self.model(model, principal) as weights,
                self.metering.request(principal.tenant, model, expected) as meter,
            ):
                owned = replace(request, weights=weights, owner=principal.tenant)
                async with aclosing(self.engine.sample(owned)) as events:
                    began = False
                    async for event in events:
                        if isinstance(event, FailedEvent):
                            raise event.error
                        if not began:
                            began = True
                            meter.prompt(prompt_tokens)
                        if isinstance(event, TokenEvent):
                            meter.sampled()
                        yield event
        except EngineError as error:
            raise make_error(error.reason, error.message) from error

    async def drain(self) -> None:
        """Takes no new work, and tells the store, also what was used."""
        self.draining = True
        await self.registration.end()
        await self.metering.report()

    def _note_served(self, run: str) -> None:
        """Remembers the last runs that requests came for."""
        self._served[run] = None
        self._served.move_to_end(run)
        if len(self._served) > _MAX_SERVED_RUNS:
            self._served.popitem(last=False)

    def _describe_load(self, worker: admin_pb2.Worker) -> None:
        worker.num_resident, worker.queue_depth = len(self.cache.names), self.engine.num_requests
        worker.draining = self.draining
