"""`treadle-trainer`: builds the trainer from its settings and serves it."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import grpc

from treadle.internal.v1 import trainer_pb2, trainer_pb2_grpc
from treadle.v1 import training_pb2, training_pb2_grpc
from treadle_engine import bases
from treadle_engine.rank_group import Launch, RankGroup
from treadle_engine.shards import GroupLostError
from treadle_service.interceptors import InternalAuthInterceptor
from treadle_service.logs import configure_logging
from treadle_service.ranks import give_up
from treadle_service.server import ServiceHost, run_service
from treadle_service.settings import load_settings
from treadle_trainer import ranks
from treadle_trainer.device import Device, load_device
from treadle_trainer.executor import Executor
from treadle_trainer.journal_client import JournalClient
from treadle_trainer.metrics import readings
from treadle_trainer.service import TrainerServicer, TrainerSlot, TrainingServicer
from treadle_trainer.settings import TrainerSettings
from treadle_trainer.trainer import Trainer


def interceptors(settings: TrainerSettings) -> Sequence[grpc.aio.ServerInterceptor]:
    """Returns what stands before the servicers: only the services of the deployment may call."""
    return (InternalAuthInterceptor(settings.internal_token.get_secret_value()),)


@asynccontextmanager
async def build(host: ServiceHost, settings: TrainerSettings) -> AsyncIterator[None]:
    """Loads the base, serves, registers with the store; hands all runs over when the host drains."""
    leader = None if Launch().is_alone else ranks.Leader(settings.rank_timeout_seconds)
    executor = Executor(leader)
    token = settings.internal_token.get_secret_value()
    store = JournalClient(settings.store_address, token, settings.shared_blobs, settings.client_tls)
    try:
        slot = TrainerSlot()
        training_pb2_grpc.add_TrainingServiceServicer_to_server(TrainingServicer(slot), host.server)
        trainer_pb2_grpc.add_TrainerServiceServicer_to_server(TrainerServicer(slot), host.server)
        host.add_service(training_pb2.DESCRIPTOR.services_by_name["TrainingService"].full_name)
        host.add_service(trainer_pb2.DESCRIPTOR.services_by_name["TrainerService"].full_name)
        await host.start()
        device = await executor.start(_loader(settings, leader))
        trainer = Trainer(settings, executor, device, store, host.advertised)
        host.metrics.add(*readings(trainer))
        await trainer.registration.reach()
        async with trainer.background(lambda _: signal.raise_signal(signal.SIGTERM)):
            slot.fill(trainer)
            host.on_drain(trainer.drain)
            await host.set_ready(True)
            # On a thread of its own: runs that come right now, from a trainer that leaves, must not wait for it.
            asyncio.get_running_loop().run_in_executor(None, Device.warm_up)
            yield
    finally:
        executor.stop()
        await store.close()


def _loader(settings: TrainerSettings, leader: ranks.Leader | None) -> Callable[[], Device]:
    def load() -> Device:
        try:
            return _load(settings, None if leader is None else leader.join(settings.device))
        except GroupLostError as error:
            give_up(error)

    return load


def _load(settings: TrainerSettings, group: RankGroup | None) -> Device:
    dtype = "float32" if settings.dtype == "auto" else settings.dtype
    path, name = bases.resolve(settings.base, settings.cache_dir.expanduser(), dtype)
    return load_device(
        path,
        settings.base_name or name,
        dtype=settings.dtype,
        device=settings.device if group is None else group.device,
        quantize=settings.quantize,
        threads=settings.threads,
        checkpoint_activations=settings.checkpoint_activations,
        max_tokens_per_pass=settings.max_tokens_per_pass,
        target_pass_seconds=settings.target_pass_seconds,
        measure_cost=settings.measure_cost,
        group=group,
    )


def follow() -> None:
    """Runs a rank other than 0 until rank 0 ends."""
    settings = load_settings(TrainerSettings)
    configure_logging("trainer", settings.log_format, settings.log_level)

    def load() -> tuple[RankGroup, Device]:
        group = RankGroup(settings.device, settings.rank_timeout_seconds)
        return group, _load(settings, group)

    ranks.follow(load)


def main() -> None:
    """Runs a trainer until SIGTERM; started by torchrun, rank 0 serves and the others follow it."""
    if Launch().rank > 0:
        follow()
        return
    run_service("trainer", TrainerSettings, build, interceptors)


if __name__ == "__main__":
    main()
