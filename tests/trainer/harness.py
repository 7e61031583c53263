"""A real store and a real trainer on loopback ports, and a plain stub client that stands where the gateway does."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from treadle.internal.v1 import (
    journal_pb2,
    journal_pb2_grpc,
    revisions_pb2,
    revisions_pb2_grpc,
    trainer_pb2,
    trainer_pb2_grpc,
)
from treadle.v1 import training_pb2, training_pb2_grpc, types_pb2
from treadle.wire import tensor_from_numpy
from treadle_service.channels import internal_metadata, open_channel
from treadle_service.principal import Principal
from treadle_service.server import ServiceHost, serve_in_process
from treadle_store import __main__ as store_main
from treadle_store.settings import StoreSettings
from treadle_trainer import __main__ as trainer_main
from treadle_trainer.settings import TrainerSettings

TOKEN = "trainer-tests"
VOCABULARY = 500


def trainer_settings(store_address: str, worker: str = "trainer-0", **changes: Any) -> TrainerSettings:
    """Returns settings of a trainer on Pip with one thread."""
    values: dict[str, Any] = {
        "listen": "127.0.0.1:0",
        "internal_token": TOKEN,
        "store_address": store_address,
        "worker": worker,
        "base": "pip",
        "dtype": "float32",
        "threads": 1,
        "drain_grace_seconds": 1.0,
        "lease_seconds": 3.0,
        "measure_cost": False,
    }
    return TrainerSettings(**{**values, **changes})


@asynccontextmanager
async def serving_store(folder: Path, listen: str = "127.0.0.1:0") -> AsyncIterator[ServiceHost]:
    """Serves a store over `folder`."""
    settings = StoreSettings(listen=listen, internal_token=TOKEN, data_dir=folder, drain_grace_seconds=1.0)
    async with serve_in_process(settings, store_main.build, store_main.make_interceptors(settings)) as host:
        yield host


@asynccontextmanager
async def serving_trainer(store_address: str, **changes: Any) -> AsyncIterator["Bench"]:
    """Serves a trainer and yields a client of both."""
    settings = trainer_settings(store_address, **changes)
    async with serve_in_process(settings, trainer_main.build, trainer_main.interceptors(settings)) as host:
        bench = Bench(store_address, host.address, host)
        try:
            yield bench
        finally:
            await bench.close()


@asynccontextmanager
async def serving(folder: Path, **changes: Any) -> AsyncIterator["Bench"]:
    """Serves a store and a trainer."""
    async with serving_store(folder) as store, serving_trainer(store.address, **changes) as bench:
        yield bench


class Bench:
    """A client of one store and one trainer."""

    def __init__(self, store_address: str, trainer_address: str, host: ServiceHost | None = None) -> None:
        self.store_address, self.host = store_address, host
        self._store, self._trainer = open_channel(store_address), open_channel(trainer_address)
        self.journal = journal_pb2_grpc.JournalServiceStub(self._store)
        self.training = training_pb2_grpc.TrainingServiceStub(self._trainer)
        self.control = trainer_pb2_grpc.TrainerServiceStub(self._trainer)
        self.internal = internal_metadata(TOKEN)

    async def close(self) -> None:
        """Closes the channels."""
        await self._store.close()
        await self._trainer.close()

    @asynccontextmanager
    async def watch(self) -> AsyncIterator[Any]:  # Any: grpc's call
        """Yields the store's news of revisions, from now on."""
        request = revisions_pb2.WatchRevisionsRequest(base="treadle/pip")
        call = revisions_pb2_grpc.RevisionServiceStub(self._store).WatchRevisions(request, metadata=self.internal)
        await call.read()
        try:
            yield call
        finally:
            call.cancel()

    async def new_run(
        self, tenant: str = "acme", rank: int = 8, seed: int = 1, from_adapter: str = "", base: str = "treadle/pip"
    ) -> str:
        """Registers a run and returns its name."""
        request = training_pb2.CreateRunRequest(
            base=base, lora=types_pb2.LoraConfig(rank=rank, alpha=32, seed=seed), from_adapter=from_adapter
        )
        if from_adapter:
            request.ClearField("lora")
        register = journal_pb2.RegisterRunRequest(tenant=tenant, run=request)
        return str((await self.journal.RegisterRun(register, metadata=self.internal, timeout=10)).run.name)

    def stream(self, run: str, tenant: str = "acme", acked_seq: int = 0) -> "Stream":
        """Opens an operation stream."""
        hello = training_pb2.StreamOperationsRequest(hello=training_pb2.Hello(protocol=1, run=run, acked_seq=acked_seq))
        return Stream(self.training.StreamOperations(metadata=metadata_of(tenant)), hello)

    async def submit(self, run: str, operation: training_pb2.Operation, tenant: str = "acme") -> bool:
        """Submits one operation; returns whether it was a repeat."""
        request = training_pb2.SubmitOperationRequest(run=run, operation=operation)
        answer = await self.training.SubmitOperation(request, metadata=metadata_of(tenant), timeout=20)
        return bool(answer.replayed)

    async def wait(self, run: str, seq: int, tenant: str = "acme") -> training_pb2.OperationResult:
        """Waits for a result."""
        request = training_pb2.WaitOperationRequest(run=run, seq=seq)
        answer = await self.training.WaitOperation(request, metadata=metadata_of(tenant), timeout=40)
        assert answer.done
        return answer.result

    async def passes(self) -> list[trainer_pb2.Pass]:
        """Returns the passes since start."""
        request = trainer_pb2.ListPassesRequest(limit=1000)
        return list((await self.control.ListPasses(request, metadata=self.internal, timeout=5)).passes)


class Stream:
    """One operation stream, driven by hand."""

    def __init__(self, call: Any, hello: training_pb2.StreamOperationsRequest) -> None:
        self.call, self._hello = call, hello
        self.welcome = training_pb2.Welcome()
        self.drained = False

    async def __aenter__(self) -> "Stream":
        await self.call.write(self._hello)
        frame = await self.read()
        assert frame.HasField("welcome"), frame
        self.welcome = frame.welcome
        return self

    async def __aexit__(self, *_: object) -> None:
        self.call.cancel()

    async def send(self, *operations: training_pb2.Operation) -> None:
        """Sends operations."""
        for operation in operations:
            await self.write(operation=operation)

    async def write(self, **frame: Any) -> None:
        """Sends one frame."""
        await self.call.write(training_pb2.StreamOperationsRequest(**frame))

    async def read(self) -> training_pb2.StreamOperationsResponse:
        """Reads one frame, or raises what ended the stream."""
        frame = await asyncio.wait_for(self.call.read(), 90)
        if frame is grpc.aio.EOF:
            raise grpc.aio.AioRpcError(
                await self.call.code(),
                await self.call.initial_metadata(),
                await self.call.trailing_metadata(),
                await self.call.details(),
            )
        return frame

    async def results(self, count: int) -> list[training_pb2.OperationResult]:
        """Reads so many results, whatever comes between them."""
        found: list[training_pb2.OperationResult] = []
        while len(found) < count:
            frame = await self.read()
            self.drained = self.drained or frame.HasField("drain")
            if frame.HasField("result"):
                found.append(frame.result)
        return found


def metadata_of(tenant: str) -> tuple[tuple[str, str], ...]:
    """Returns the metadata with which the gateway forwards a tenant's call."""
    return internal_metadata(TOKEN, Principal(tenant, frozenset({"train"})))


def columns(seed: int, rows: int = 3, length: int = 12) -> dict[str, np.ndarray]:
    """Returns a random batch: lengths [R], tokens and targets [T], weights [T]."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(length // 2, length + 1, rows)
    total = int(lengths.sum())
    return {
        "lengths": lengths.astype(np.int64),
        "tokens": rng.integers(0, VOCABULARY, total).astype(np.int32),
        "targets": rng.integers(0, VOCABULARY, total).astype(np.int32),
        "weights": np.ones(total, np.float32),
    }


def batch(seed: int, rows: int = 3, length: int = 12) -> types_pb2.Batch:
    """Returns the same batch as a message."""
    data = columns(seed, rows, length)
    packed = types_pb2.PackedBatch(
        lengths=data["lengths"].astype("<u4").tobytes(),
        tokens=tensor_from_numpy(data["tokens"]),
        targets=tensor_from_numpy(data["targets"]),
    )
    packed.columns["weights"].CopyFrom(tensor_from_numpy(data["weights"]))
    return types_pb2.Batch(packed=packed)


def forward_backward(seq: int, seed: int = 0, loss: str = "cross_entropy", **size: int) -> training_pb2.Operation:
    """Returns a forward_backward on a random batch."""
    body = training_pb2.ForwardBackward(batch=batch(seed, **size), loss_fn=training_pb2.LossFn(name=loss))
    return training_pb2.Operation(seq=seq, forward_backward=body)


def optim_step(seq: int, learning_rate: float = 1e-2) -> training_pb2.Operation:
    """Returns an optim_step."""
    adam = types_pb2.AdamParams(learning_rate=learning_rate, eps=1e-8)
    return training_pb2.Operation(seq=seq, optim_step=training_pb2.OptimStep(adam=adam))


def steps(count: int, first_seq: int = 1) -> list[training_pb2.Operation]:
    """Returns so many steps of forward_backward and optim_step, each with its own data."""
    operations = []
    for step in range(count):
        seq = first_seq + 2 * step
        operations += [forward_backward(seq, seed=seq), optim_step(seq + 1)]
    return operations


async def refused(call: Awaitable[object] | Callable[[], Awaitable[object]]) -> grpc.aio.AioRpcError:
    """Returns the error with which a call ends."""
    try:
        await (call() if callable(call) else call)
    except grpc.aio.AioRpcError as error:
        return error
    raise AssertionError("the call was not refused")
