"""A store and a gateway in this process, and a peer that speaks a trainer's side of the wire."""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from grpc_status import rpc_status
from pydantic import SecretStr

from treadle.errors import make_error, to_status
from treadle.internal.v1 import journal_pb2, journal_pb2_grpc, workers_pb2, workers_pb2_grpc
from treadle.v1 import admin_pb2, admin_pb2_grpc, training_pb2, training_pb2_grpc
from treadle_gateway import app
from treadle_gateway.settings import GatewaySettings
from treadle_service.channels import internal_metadata
from treadle_service.server import ServiceHost, serve_in_process
from treadle_store import __main__ as store_app
from treadle_store.settings import StoreSettings

TOKEN = "internal-token"
BASE = "treadle/pip"


class WirePeer(training_pb2_grpc.TrainingServiceServicer):
    """Answers every operation with its seq, or as told; remembers what reached it. It computes nothing."""

    def __init__(self) -> None:
        self.metadata: dict[str, str] = {}
        self.frames: list[training_pb2.StreamOperationsRequest] = []
        self.refuse_seq = 0
        self.seconds_left: float | None = None
        self.server = grpc.aio.server()
        training_pb2_grpc.add_TrainingServiceServicer_to_server(self, self.server)
        self.address = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"

    async def StreamOperations(self, request_iterator, context):
        """Welcome, then a result per operation."""
        self.metadata = dict(context.invocation_metadata())
        async for frame in request_iterator:
            self.frames.append(frame)
            if frame.HasField("hello"):
                yield training_pb2.StreamOperationsResponse(welcome=training_pb2.Welcome(next_seq=1))
            elif frame.HasField("goodbye"):
                return
            elif frame.operation.seq == self.refuse_seq:
                await self._refuse(context)
            else:
                result = training_pb2.OperationResult(seq=frame.operation.seq)
                yield training_pb2.StreamOperationsResponse(result=result)

    async def SubmitOperation(self, request, context):
        """Accepts."""
        self.metadata = dict(context.invocation_metadata())
        self.seconds_left = context.time_remaining()
        if request.operation.seq == self.refuse_seq:
            await self._refuse(context)
        return training_pb2.SubmitOperationResponse(seq=request.operation.seq)

    @staticmethod
    async def _refuse(context):
        status = rpc_status.to_status(to_status(make_error("SEQ_GAP", "seq 9 does not follow 3; send 4", 1.5)))
        await context.abort(status.code, status.details, status.trailing_metadata)


@dataclass
class Front:
    """The gateway under test and what is behind it."""

    gateway: ServiceHost
    store: ServiceHost
    folder: Path
    channel: grpc.aio.Channel
    store_channel: grpc.aio.Channel
    peers: list[WirePeer] = field(default_factory=list)

    @property
    def admin(self) -> tuple[tuple[str, str], ...]:
        """Metadata with the first admin key."""
        return bearer((self.folder / "admin.key").read_text().strip())

    async def tenant(self, name: str, *scopes: str) -> tuple[tuple[str, str], ...]:
        """Makes a tenant and returns metadata with a key of it."""
        stub = admin_pb2_grpc.AdminServiceStub(self.channel)
        await stub.CreateTenant(admin_pb2.CreateTenantRequest(tenant=name), metadata=self.admin)
        request = admin_pb2.CreateKeyRequest(tenant=name, scopes=scopes)
        return bearer((await stub.CreateKey(request, metadata=self.admin)).secret)

    async def add_peer(self, worker: str = "trainer-0", base: str = BASE) -> WirePeer:
        """Starts a peer and registers it as a trainer of `base`."""
        peer = WirePeer()
        await peer.server.start()
        self.peers.append(peer)
        heartbeat = workers_pb2.HeartbeatRequest(
            worker=admin_pb2.Worker(worker=worker, kind=admin_pb2.WORKER_KIND_TRAINER, base=base, address=peer.address),
            base=admin_pb2.BaseModel(name=base, trainable=True),
            ttl=Duration(seconds=60),
        )
        stub = workers_pb2_grpc.WorkerServiceStub(self.store_channel)
        await stub.Heartbeat(heartbeat, metadata=internal_metadata(TOKEN))
        return peer

    async def claim(self, run: str, worker: str, address: str) -> None:
        """Gives a worker the lease of a run."""
        request = journal_pb2.ClaimRunRequest(run=run, holder=worker, address=address, ttl=Duration(seconds=60))
        stub = journal_pb2_grpc.JournalServiceStub(self.store_channel)
        await stub.ClaimRun(request, metadata=internal_metadata(TOKEN))

    async def new_run(self, metadata) -> str:
        """Creates a run and returns its name."""
        stub = training_pb2_grpc.TrainingServiceStub(self.channel)
        return (await stub.CreateRun(training_pb2.CreateRunRequest(base=BASE), metadata=metadata)).run.name


def bearer(secret: str) -> tuple[tuple[str, str], ...]:
    """Returns the metadata that carries a key."""
    return (("authorization", f"Bearer {secret}"),)


async def read_all(call) -> list:
    """Returns all responses of a stream, or raises how it ended."""
    return [response async for response in call]


@pytest.fixture
def gateway_settings() -> dict[str, object]:
    """Settings of the gateway that a test wants otherwise: parametrize it."""
    return {}


@pytest.fixture
async def front(tmp_path: Path, gateway_settings: dict[str, object]) -> AsyncIterator[Front]:
    """A store and a gateway on loopback; workers come when a test adds them."""
    token = SecretStr(TOKEN)
    store_settings = StoreSettings(listen="127.0.0.1:0", data_dir=tmp_path, internal_token=token, drain_grace_seconds=0)
    async with serve_in_process(store_settings, store_app.build, store_app.make_interceptors(store_settings)) as store:
        values: dict[str, object] = {
            "http_listen": "127.0.0.1:0",
            "refresh_seconds": 0.05,
            "key_cache_seconds": 0,
            "drain_grace_seconds": 0.2,
        }
        settings = GatewaySettings(
            listen="127.0.0.1:0", store_address=store.address, internal_token=token, **(values | gateway_settings)
        )
        async with (
            serve_in_process(settings, app.build, app.make_interceptors(settings)) as gateway,
            grpc.aio.insecure_channel(gateway.address) as channel,
            grpc.aio.insecure_channel(store.address) as store_channel,
        ):
            running = Front(gateway, store, tmp_path, channel, store_channel)
            yield running
            for peer in running.peers:
                await peer.server.stop(0)
