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
from treadle_service.interceptors import InternalAuthInterceptor
from treadle_service.server import ServiceHost, run_service
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
    executor = Executor()
    token = settings.internal_token.get_secret_value()
    store = JournalClient(settings.store_address, token, settings.shared_blobs, settings.client_tls)
    try:
        slot = TrainerSlot()
        training_pb2_grpc.add_TrainingServiceServicer_to_server(TrainingServicer(slot), host.server)
        trainer_pb2_grpc.add_TrainerServiceServicer_to_server(TrainerServicer(slot), host.server)
        host.add_service(training_pb2.DESCRIPTOR.services_by_name["TrainingService"].full_name)
        host.add_service(trainer_pb2.DESCRIPTOR.services_by_name["TrainerService"].full_name)
        await host.start()
        device = await executor.start(_loader(settings))
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


def _loader(settings: TrainerSettings) -> Callable[[], Device]:
    def load() -> Device:
        dtype = "float32" if settings.dtype == "auto" else settings.dtype
        path, name = bases.resolve(settings.base, settings.cache_dir.expanduser(), dtype)
        return load_device(
            path,
            settings.base_name or name,
            dtype=settings.dtype,
            device=settings.device,
            quantize=settings.quantize,
            threads=settings.threads,
            checkpoint_activations=settings.checkpoint_activations,
            max_tokens_per_pass=settings.max_tokens_per_pass,
            target_pass_seconds=settings.target_pass_seconds,
            measure_cost=settings.measure_cost,
        )

    return load


def main() -> None:
    """Runs a trainer until SIGTERM."""
    run_service("trainer", TrainerSettings, build, interceptors)


if __name__ == "__main__":
    main()
