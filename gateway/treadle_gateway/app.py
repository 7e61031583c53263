"""Puts a gateway together: interceptor, services, and the task that watches the workers.

Knows nothing of how the process starts and stops.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

import grpc

from treadle_gateway.auth import AuthInterceptor
from treadle_gateway.directory import Directory
from treadle_gateway.forward import Forwarder, Upstreams
from treadle_gateway.live_calls import CallLimits
from treadle_gateway.service import PUBLIC_SERVICES, Gateway
from treadle_gateway.settings import GatewaySettings
from treadle_service.server import ServiceHost


def make_interceptors(settings: GatewaySettings) -> Sequence[grpc.aio.ServerInterceptor]:
    """Returns the interceptors of a gateway: authentication, which also turns exceptions into statuses."""
    token = settings.internal_token.get_secret_value()
    limits = CallLimits(settings.max_calls, settings.max_calls_per_tenant, settings.max_streams_per_tenant)
    return [AuthInterceptor(settings.store_address, token, settings.key_cache_seconds, limits, settings.client_tls)]


@contextlib.asynccontextmanager
async def build(host: ServiceHost, settings: GatewaySettings) -> AsyncIterator[None]:
    """Serves the public services on `host`; ready once the store has named the workers."""
    upstreams = Upstreams(settings.client_tls)
    forwarder = Forwarder(upstreams)
    directory = Directory(settings, upstreams.channel(settings.store_address))
    gateway = Gateway(directory, forwarder, settings.store_address)
    host.server.add_generic_rpc_handlers(gateway.generic_handlers())
    for service in PUBLIC_SERVICES:
        host.add_service(service.full_name)
    # Half of the grace for streams, so that the calls that follow them still have some.
    host.on_drain(lambda: forwarder.end_streams(settings.drain_grace_seconds / 2))
    await host.start()

    async def on_refresh() -> None:
        await host.set_ready(True)
        await gateway.cut_lost_streams()
        live = frozenset(worker.address for worker in directory.table.workers)
        await upstreams.retain(live | {settings.store_address})

    watching = asyncio.create_task(directory.keep_fresh(on_refresh))
    try:
        yield
    finally:
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching
        await upstreams.close()
