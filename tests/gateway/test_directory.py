"""What a gateway asks the store while the store is silent."""

import asyncio

import grpc
import pytest
from pydantic import SecretStr

from tests.gateway.conftest import TOKEN
from treadle.internal.v1 import workers_pb2_grpc
from treadle_gateway import directory
from treadle_gateway.directory import Directory
from treadle_gateway.settings import GatewaySettings


class SilentStore(workers_pb2_grpc.WorkerServiceServicer):
    """Takes every question and answers none."""

    def __init__(self) -> None:
        self.num_asked = 0

    async def ScanWorkers(self, request, context):
        """Counts."""
        self.num_asked += 1
        await asyncio.sleep(3600)


async def test_callers_who_look_for_a_worker_at_once_share_the_wait_for_a_silent_store(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not one after the other, each for a deadline of its own."""
    monkeypatch.setattr(directory, "STORE_SECONDS", 0.3)
    store, server = SilentStore(), grpc.aio.server()
    workers_pb2_grpc.add_WorkerServiceServicer_to_server(store, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    settings = GatewaySettings(internal_token=SecretStr(TOKEN))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        known = Directory(settings, channel)
        await asyncio.gather(*(known.look_again() for _ in range(20)))
    await server.stop(None)
    assert 1 <= store.num_asked <= 2
