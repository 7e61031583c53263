"""A real store and a real sampler on loopback ports, and a stub client that stands where the gateway does."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import google_crc32c
import grpc
import numpy as np

from tests.sampler.conftest import make_prompt
from treadle.errors import TreadleError, from_rpc_error
from treadle.internal.v1 import (
    blobs_pb2,
    blobs_pb2_grpc,
    journal_pb2,
    journal_pb2_grpc,
    revisions_pb2,
    revisions_pb2_grpc,
    sampler_pb2,
    sampler_pb2_grpc,
    workers_pb2,
    workers_pb2_grpc,
)
from treadle.v1 import adapters_pb2, sampling_pb2, sampling_pb2_grpc, training_pb2, types_pb2
from treadle.wire import decode_tokens, encode_tokens
from treadle_engine.bases import PIP_NAME
from treadle_engine.decode_base import DecodeBase
from treadle_engine.lora import AdapterWeights
from treadle_engine.peft_format import CONFIG_FILE, WEIGHTS_FILE, to_files
from treadle_sampler import __main__ as sampler_main
from treadle_sampler.settings import SamplerSettings
from treadle_service.channels import Metadata, internal_metadata, open_channel
from treadle_service.principal import Principal
from treadle_service.server import serve_in_process
from treadle_store import __main__ as store_main
from treadle_store.settings import StoreSettings

TOKEN = "sampler-tests"


def as_tenant(tenant: str) -> Metadata:
    """Return the metadata that the gateway sends for a tenant."""
    return internal_metadata(TOKEN, Principal(tenant, frozenset({"sample", "train"})))


@asynccontextmanager
async def serving(folder: Path, **changes: Any) -> AsyncIterator[Bench]:
    """Serve a store and a sampler on Pip, and yield a client of both."""
    common: dict[str, Any] = {"listen": "127.0.0.1:0", "internal_token": TOKEN, "drain_grace_seconds": 1.0}
    store = StoreSettings(data_dir=folder, **common)
    async with serve_in_process(store, store_main.build, store_main.make_interceptors(store)) as host:
        values = {"base": "pip", "dtype": "float32", "threads": 1, "worker": "sampler-0", **common, **changes}
        sampler = SamplerSettings(store_address=host.address, **values)
        async with serve_in_process(sampler, sampler_main.build, sampler_main.interceptors(sampler)) as front:
            bench = Bench(host.address, front.address)
            try:
                yield bench
            finally:
                await bench.close()


class Bench:
    """A client of one store and one sampler."""

    def __init__(self, store: str, sampler: str) -> None:
        self.store_address = store
        self.store_channel, self._sampler = open_channel(store), open_channel(sampler)
        self.journal = journal_pb2_grpc.JournalServiceStub(self.store_channel)
        self.blobs = blobs_pb2_grpc.BlobServiceStub(self.store_channel)
        self.workers = workers_pb2_grpc.WorkerServiceStub(self.store_channel)
        self.sampling = sampling_pb2_grpc.SamplingServiceStub(self._sampler)
        self.control = sampler_pb2_grpc.SamplerServiceStub(self._sampler)
        self.internal = internal_metadata(TOKEN)

    async def close(self) -> None:
        """Close the channels."""
        await self.store_channel.close()
        await self._sampler.close()

    async def publish(self, base: DecodeBase, weights: AdapterWeights, revision: str, tenant: str = "acme") -> str:
        """Store a revision of a new run as a trainer would, and return its name."""
        return await self.save(await self.new_run(weights.config.rank, tenant), base, weights, revision)

    async def new_run(self, rank: int, tenant: str = "acme") -> str:
        """Register a run and return its name."""
        run = training_pb2.CreateRunRequest(base=PIP_NAME, lora=types_pb2.LoraConfig(rank=rank))
        register = journal_pb2.RegisterRunRequest(tenant=tenant, run=run)
        return (await self.journal.RegisterRun(register, metadata=self.internal)).run.name

    async def announce(self, name: str, base: DecodeBase, weights: AdapterWeights, incoming: Path) -> Path:
        """Write a run's weights into a shared folder as a trainer would, say that they are there, return where."""
        files, file = to_files(base, weights), incoming / secrets.token_hex(16)
        file.write_bytes(files[WEIGHTS_FILE])
        revision = revisions_pb2.RevisionArriving(
            run=name, file=file.name, size=file.stat().st_size, config=files[CONFIG_FILE]
        )
        request = revisions_pb2.AnnounceRevisionRequest(base=PIP_NAME, revision=revision)
        stub = revisions_pb2_grpc.RevisionServiceStub(self.store_channel)
        await stub.AnnounceRevision(request, metadata=self.internal)
        return file

    async def save(
        self, name: str, base: DecodeBase, weights: AdapterWeights, revision: str, announced: Path | None = None
    ) -> str:
        """Store a revision of a run as a trainer would, its weights by the file that was announced; return its name."""
        lora = types_pb2.LoraConfig(rank=weights.config.rank)
        claim = journal_pb2.ClaimRunRequest(run=name, holder="t", address="127.0.0.1:1")
        claim.ttl.FromSeconds(60)
        epoch = (await self.journal.ClaimRun(claim, metadata=self.internal)).lease.epoch
        adapter = adapters_pb2.Adapter(name=f"{name}/revisions/{revision}", base=PIP_NAME, lora=lora)
        adapter.created.GetCurrentTime()
        for path, content in to_files(base, weights).items():
            sha256 = hashlib.sha256(content).hexdigest()
            if announced is not None and path == WEIGHTS_FILE:
                adopt = blobs_pb2.AdoptBlobRequest(file=announced.name, size=len(content))
                await self.blobs.AdoptBlob(adopt, metadata=self.internal)
            else:
                await self.blobs.PutBlob(_frames(content, sha256), metadata=self.internal)
            adapter.files.add(path=path, size=len(content), sha256=sha256)
        record = journal_pb2.RecordAdapterRequest(run=name, epoch=epoch, adapter=adapter, seq=1)
        await self.journal.RecordAdapter(record, metadata=self.internal)
        return adapter.name

    async def sample(self, request: sampling_pb2.SampleRequest, tenant: str = "acme") -> sampling_pb2.SampleResponse:
        """Sample; raises TreadleError."""
        try:
            return await self.sampling.Sample(request, metadata=as_tenant(tenant), timeout=60)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error

    async def refusal(self, request: sampling_pb2.SampleRequest, tenant: str = "acme") -> str:
        """Sample, and return the reason of the refusal."""
        try:
            await self.sample(request, tenant)
        except TreadleError as error:
            return error.reason
        return "none"

    async def status(self) -> sampler_pb2.GetSamplerStatusResponse:
        """Return the sampler's load."""
        request = sampler_pb2.GetSamplerStatusRequest()
        return await self.control.GetSamplerStatus(request, metadata=self.internal)

    async def live_workers(self) -> list[workers_pb2.WorkerEntry]:
        """Return the workers that the store knows."""
        answer = await self.workers.ScanWorkers(workers_pb2.ScanWorkersRequest(), metadata=self.internal)
        return list(answer.workers)


async def _frames(content: bytes, sha256: str) -> AsyncIterator[blobs_pb2.PutBlobRequest]:
    yield blobs_pb2.PutBlobRequest(header=blobs_pb2.BlobHeader(sha256=sha256, size=len(content)))
    for start in range(0, len(content), 2**20):
        piece = content[start : start + 2**20]
        yield blobs_pb2.PutBlobRequest(chunk=blobs_pb2.BlobChunk(crc32c=google_crc32c.value(piece), data=piece))


def ask(model: str = PIP_NAME, length: int = 12, num_samples: int = 1, **params: Any) -> sampling_pb2.SampleRequest:
    """Return a request with a random prompt; 8 tokens and seed 1 unless told otherwise."""
    chosen = {"max_tokens": 8, "seed": 1, "ignore_eos": True, **params}
    return sampling_pb2.SampleRequest(
        model=model,
        prompt=encode_tokens(make_prompt(length)),
        num_samples=num_samples,
        params=sampling_pb2.SamplingParams(**chosen),
    )


def tokens_of(response: sampling_pb2.SampleResponse) -> list[list[int]]:
    """Return the tokens of each continuation."""
    return [decode_tokens(sequence.tokens).tolist() for sequence in response.sequences]


def floats_of(tensor: types_pb2.Tensor) -> list[float]:
    """Return the elements of a float32 tensor."""
    return np.frombuffer(tensor.data, "<f4").tolist()
