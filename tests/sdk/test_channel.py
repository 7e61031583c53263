"""The channel's options do what they are for."""

import asyncio
from collections.abc import Sequence

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from tests.support.proxy import TroubleProxy
from treadle.channel import CHANNEL_OPTIONS
from treadle_service.channels import PEER_OPTIONS, SERVER_OPTIONS


async def test_a_server_that_is_slow_to_connect_to_is_waited_for() -> None:
    """Over a link of 600 ms a call's first connection comes up, and the call is answered."""
    server = grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    with TroubleProxy(f"127.0.0.1:{port}", delay_seconds=0.3) as proxy:
        async with grpc.aio.insecure_channel(proxy.address, options=CHANNEL_OPTIONS) as channel:
            answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    await server.stop(None)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("options", [CHANNEL_OPTIONS, PEER_OPTIONS], ids=["client", "peer"])
async def test_a_peer_that_vanished_is_found_by_keepalive(options: Sequence[tuple[str, int]]) -> None:
    """Though nothing closes the connection, an idle stream ends by itself, on both sides, within a minute or so."""
    server = grpc.aio.server(options=SERVER_OPTIONS)
    health_pb2_grpc.add_HealthServicer_to_server(servicer := _Watched(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    with TroubleProxy(f"127.0.0.1:{port}") as proxy:
        async with grpc.aio.insecure_channel(proxy.address, options=options) as channel:
            stream = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            assert (await stream.read()).status == health_pb2.HealthCheckResponse.SERVING
            proxy.silent = True
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await stream.read()
            assert raised.value.code() == grpc.StatusCode.UNAVAILABLE
            await servicer.ended.wait()
            proxy.silent = False
    await server.stop(None)


class _Watched(health.aio.HealthServicer):
    """Notes when its stream ended."""

    def __init__(self) -> None:
        super().__init__()
        self.ended = asyncio.Event()

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext) -> None:
        try:
            await super().Watch(request, context)
        finally:
            self.ended.set()
