"""`treadle-sampler`: builds the sampler from its settings and serves it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import grpc

from treadle.internal.v1 import sampler_pb2, sampler_pb2_grpc
from treadle.v1 import sampling_pb2, sampling_pb2_grpc
from treadle_engine import bases
from treadle_engine.allocator import keep_freed_memory
from treadle_engine.base_model import KnownBase
from treadle_engine.decode import Decoder
from treadle_engine.decode_base import DecodeBase
from treadle_engine.determinism import settle
from treadle_engine.errors import EngineError
from treadle_engine.outline import BaseOutline
from treadle_engine.rank_group import Launch, RankGroup
from treadle_engine.shards import GroupLostError
from treadle_engine.stops import load_detokenizer
from treadle_sampler import ranks
from treadle_sampler.backend import SamplerBackend
from treadle_sampler.engine_loop import EngineLoop
from treadle_sampler.metrics import readings
from treadle_sampler.sampler import Sampler
from treadle_sampler.service import SamplerServicer, SamplerSlot, SamplingServicer
from treadle_sampler.settings import SamplerSettings
from treadle_sampler.vllm_backend import VllmBackend
from treadle_service.interceptors import InternalAuthInterceptor
from treadle_service.logs import configure_logging
from treadle_service.ranks import give_up
from treadle_service.server import ServiceHost, run_service
from treadle_service.settings import load_settings
from treadle_service.store_client import StoreClient


def interceptors(settings: SamplerSettings) -> Sequence[grpc.aio.ServerInterceptor]:
    """Returns what stands before the servicers: only the services of the deployment may call."""
    return (InternalAuthInterceptor(settings.internal_token.get_secret_value()),)


@asynccontextmanager
async def build(host: ServiceHost, settings: SamplerSettings) -> AsyncIterator[None]:
    """Loads the base, serves, and registers with the store."""
    engine = EngineLoop(settings.max_requests)
    leader = None if Launch().is_alone else ranks.Leader(settings.rank_timeout_seconds)
    token = settings.internal_token.get_secret_value()
    store = StoreClient(settings.store_address, token, settings.shared_blobs, settings.client_tls)
    try:
        slot = SamplerSlot()
        sampling_pb2_grpc.add_SamplingServiceServicer_to_server(SamplingServicer(slot), host.server)
        sampler_pb2_grpc.add_SamplerServiceServicer_to_server(SamplerServicer(slot), host.server)
        host.add_service(sampling_pb2.DESCRIPTOR.services_by_name["SamplingService"].full_name)
        host.add_service(sampler_pb2.DESCRIPTOR.services_by_name["SamplerService"].full_name)
        await host.start()
        base = await engine.start(_loader(settings, leader))
        sampler = Sampler(settings, engine, base, store, host.advertised)
        host.metrics.add(*readings(sampler, base.info.name, settings.worker))
        await sampler.registration.reach()
        host.on_drain(sampler.drain)
        works = (sampler.registration.run_forever, sampler.watch.run_forever, sampler.metering.run_forever)
        tasks = [asyncio.create_task(work()) for work in works]
        if leader is not None:
            tasks.append(asyncio.create_task(leader.beat_forever(engine.call)))
        try:
            slot.fill(sampler)
            await host.set_ready(True)
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            # What the calls that ended last have used.
            await sampler.metering.report()
    finally:
        await engine.stop(None if leader is None else leader.end)
        await store.close()


def _loader(settings: SamplerSettings, leader: ranks.Leader | None) -> Callable[[], tuple[KnownBase, SamplerBackend]]:
    def load() -> tuple[KnownBase, SamplerBackend]:
        if settings.backend == "vllm":
            return _load_vllm(settings)
        if leader is None:
            return _load(settings, None)
        try:
            base, decoder = _load(settings, leader.join(settings.device))
        except GroupLostError as error:
            give_up(error)
        return base, leader.lead(decoder)

    return load


def _load_vllm(settings: SamplerSettings) -> tuple[KnownBase, SamplerBackend]:
    if settings.quantize != "none":
        raise EngineError("BAD_VALUE", "backend=vllm does not take quantize: vLLM would round the weights otherwise")
    settle(settings.threads)
    dtype = "float32" if settings.dtype == "auto" else settings.dtype
    path, name = bases.resolve(settings.base, settings.cache_dir.expanduser(), dtype)
    base = BaseOutline.load(path, name=settings.base_name or name, dtype=settings.dtype, device=settings.device)
    detokenize = load_detokenizer(path)
    return base, VllmBackend(base, detokenize, max_sequences=settings.max_sequences, options=settings.vllm_options)


def _load(settings: SamplerSettings, group: RankGroup | None) -> tuple[DecodeBase, Decoder]:
    settle(settings.threads)
    keep_freed_memory()
    dtype = "float32" if settings.dtype == "auto" else settings.dtype
    path, name = bases.resolve(settings.base, settings.cache_dir.expanduser(), dtype)
    base = DecodeBase.load(
        path,
        name=settings.base_name or name,
        dtype=settings.dtype,
        device=settings.device if group is None else group.device,
        quantize=settings.quantize,
        shard=None if group is None else group.shard,
    )
    if group is not None:
        group.check_alike(base.info, settings.max_sequences, settings.max_cache_tokens)
    if settings.prepack:
        base.prepack()
    base.compile()
    decoder = Decoder(
        base,
        load_detokenizer(path),
        max_sequences=settings.max_sequences,
        max_cache_tokens=settings.max_cache_tokens,
        settle=None if group is None else ranks.settle_draws(group.main),
    )
    decoder.prepare()
    return base, decoder


def follow() -> None:
    """Runs a rank other than 0 until rank 0 ends."""
    settings = load_settings(SamplerSettings)
    configure_logging("sampler", settings.log_format, settings.log_level)

    def load() -> tuple[RankGroup, tuple[DecodeBase, Decoder]]:
        group = RankGroup(settings.device, settings.rank_timeout_seconds)
        return group, _load(settings, group)

    ranks.follow(load)


def main() -> None:
    """Runs a sampler until SIGTERM; started by torchrun, rank 0 serves and the others follow it."""
    if Launch().rank > 0:
        follow()
        return
    run_service("sampler", SamplerSettings, build, interceptors)


if __name__ == "__main__":
    main()
