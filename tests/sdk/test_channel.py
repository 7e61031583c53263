"""The channel's options do what they are for."""

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from tests.support.proxy import TroubleProxy
from treadle.channel import CHANNEL_OPTIONS


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
