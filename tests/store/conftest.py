"""A real store on a loopback port with a clock that tests move, and callers of several tenants."""

import hashlib
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import google_crc32c
import grpc
import pytest
from pydantic import SecretStr

from tests.support.s3 import ACCESS_KEY_ID, REGION, SECRET_ACCESS_KEY, S3Server
from treadle.errors import from_rpc_error
from treadle.internal.v1 import (
    blobs_pb2,
    blobs_pb2_grpc,
    identity_pb2_grpc,
    journal_pb2,
    journal_pb2_grpc,
    usage_pb2_grpc,
    workers_pb2_grpc,
)
from treadle.v1 import adapters_pb2_grpc, admin_pb2_grpc, datasets_pb2_grpc, training_pb2, types_pb2
from treadle_service.channels import internal_metadata, open_channel
from treadle_service.principal import Principal
from treadle_service.server import serve_in_process
from treadle_store.__main__ import build, make_interceptors
from treadle_store.database import Database
from treadle_store.settings import StoreSettings

TOKEN = "a-token-of-this-deployment"


class FakeClock:
    """Time that moves when told to."""

    def __init__(self) -> None:
        self.now_us = 1_700_000_000_000_000

    def __call__(self) -> int:
        self.now_us += 1
        return self.now_us

    def advance(self, seconds: float) -> None:
        self.now_us += int(seconds * 1e6)


class _Authorized:
    """A stub whose calls carry metadata."""

    def __init__(self, stub: object, metadata: tuple[tuple[str, str], ...]) -> None:
        self._stub = stub
        self._metadata = metadata

    def __getattr__(self, name: str):
        return partial(getattr(self._stub, name), metadata=self._metadata)


class Caller:
    """The store as one principal sees it."""

    def __init__(self, channel: grpc.aio.Channel, principal: Principal | None = None, token: str = TOKEN) -> None:
        self.channel = channel
        metadata = internal_metadata(token, principal)
        self.journal = _Authorized(journal_pb2_grpc.JournalServiceStub(channel), metadata)
        self.blobs = _Authorized(blobs_pb2_grpc.BlobServiceStub(channel), metadata)
        self.identity = _Authorized(identity_pb2_grpc.IdentityServiceStub(channel), metadata)
        self.workers = _Authorized(workers_pb2_grpc.WorkerServiceStub(channel), metadata)
        self.adapters = _Authorized(adapters_pb2_grpc.AdapterServiceStub(channel), metadata)
        self.usage = _Authorized(usage_pb2_grpc.UsageServiceStub(channel), metadata)
        self.datasets = _Authorized(datasets_pb2_grpc.DatasetServiceStub(channel), metadata)
        self.admin = _Authorized(admin_pb2_grpc.AdminServiceStub(channel), metadata)

    def tenant(self, tenant: str, *scopes: str) -> "Caller":
        return Caller(self.channel, Principal(tenant, frozenset(scopes or ("train", "sample"))))

    async def new_run(self, tenant: str = "acme", **fields: object) -> str:
        request = training_pb2.CreateRunRequest(
            **{"base": "treadle/pip", "lora": types_pb2.LoraConfig(rank=4), **fields}
        )
        answer = await self.journal.RegisterRun(journal_pb2.RegisterRunRequest(tenant=tenant, run=request))
        return answer.run.name

    async def claim(self, run: str, holder: str = "trainer-0") -> int:
        answer = await self.journal.ClaimRun(journal_pb2.ClaimRunRequest(run=run, holder=holder, address="h:1"))
        return answer.lease.epoch

    async def write(self, *entries: journal_pb2.JournalEntry) -> list[str]:
        answer = await self.journal.WriteJournal(journal_pb2.WriteJournalRequest(entries=entries))
        return [error.reason for error in answer.errors]

    async def put_blob(self, content: bytes) -> str:
        address = hashlib.sha256(content).hexdigest()
        frames = [blobs_pb2.PutBlobRequest(header=blobs_pb2.BlobHeader(sha256=address, size=len(content)))]
        frames += [blobs_pb2.PutBlobRequest(chunk=chunk) for chunk in blob_chunks(content)]
        await self.blobs.PutBlob(iter(frames))
        return address

    async def recover(self, run: str, epoch: int):
        call = self.journal.RecoverRun(journal_pb2.RecoverRunRequest(run=run, epoch=epoch))
        frames = [frame async for frame in call]
        return frames[0].header, [frame.operation for frame in frames[1:]]


def blob_chunks(content: bytes, size: int = 2**20) -> Iterator[blobs_pb2.BlobChunk]:
    for start in range(0, len(content), size):
        data = content[start : start + size]
        yield blobs_pb2.BlobChunk(data=data, crc32c=google_crc32c.value(data))


async def reason_of(call) -> str:
    """Awaits a call (or reads a stream) that must fail; returns the reason."""
    try:
        if hasattr(call, "__aiter__"):
            async for _ in call:
                pass
        else:
            await call
    except grpc.aio.AioRpcError as error:
        return from_rpc_error(error).reason
    return ""


def entry(run: str, epoch: int, appends=(), commits=(), acked: int = 0) -> journal_pb2.JournalEntry:
    """Returns an entry; an append is (seq, digest) or a seq, a commit a seq."""
    pairs = [(a, a) if isinstance(a, int) else a for a in appends]
    return journal_pb2.JournalEntry(
        run=run,
        epoch=epoch,
        appends=[journal_pb2.JournalAppend(seq=s, digest=d, payload=b"op %d" % s) for s, d in pairs],
        commits=[journal_pb2.JournalCommit(seq=s, result=b"result %d" % s, state_digest=b"state") for s in commits],
        acked_seq=acked,
    )


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database of this test's own, of each kind in turn."""
    if request.param == "postgres":
        return request.getfixturevalue("postgres").new_database()
    return f"sqlite:///{tmp_path / 'store.db'}"


def s3_settings(server: S3Server, endpoint: str = "") -> dict[str, object]:
    """Returns the settings of a fresh bucket."""
    return {
        "blobs_url": f"s3://{server.new_bucket()}/some/prefix",
        "s3_endpoint": endpoint or server.endpoint,
        "s3_region": REGION,
        "s3_access_key_id": ACCESS_KEY_ID,
        "s3_secret_access_key": SecretStr(SECRET_ACCESS_KEY),
    }


@pytest.fixture(params=["sqlite and a folder", "postgresql and s3"])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> StoreSettings:
    """Everything on one machine, and everything elsewhere."""
    elsewhere: dict[str, object] = {}
    if request.param != "sqlite and a folder":
        url = request.getfixturevalue("postgres").new_database()
        elsewhere = {"database_url": url, **s3_settings(request.getfixturevalue("s3"))}
    return StoreSettings(listen="127.0.0.1:0", data_dir=tmp_path / "data", internal_token=SecretStr(TOKEN), **elsewhere)


@asynccontextmanager
async def serve(settings: StoreSettings, clock: FakeClock) -> AsyncIterator[Caller]:
    """A store in this process and a caller that is another service."""
    serving = serve_in_process(settings, partial(build, clock=clock), make_interceptors(settings))
    async with serving as host, open_channel(host.address) as channel:
        yield Caller(channel)


@pytest.fixture
async def store(settings: StoreSettings, clock: FakeClock) -> AsyncIterator[Caller]:
    async with serve(settings, clock) as caller:
        yield caller


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    opened = Database(database_url)
    yield opened
    opened.close()
