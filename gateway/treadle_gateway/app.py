"""Puts a gateway together: interceptor, services, HTTP faces, and the task that watches the workers.

Knows nothing of how the process starts and stops.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

import grpc

from treadle_gateway.auth import AuthInterceptor
from treadle_gateway.authenticator import Authenticator
from treadle_gateway.directory import Directory
from treadle_gateway.forward import Forwarder, Upstreams
from treadle_gateway.http.assembly import make_app, make_faces
from treadle_gateway.http.faces import HttpGateway
from treadle_gateway.http.server import HttpServer
from treadle_gateway.live_calls import CallLimits
from treadle_gateway.local_calls import LocalCalls
from treadle_gateway.metrics import readings
from treadle_gateway.service import PUBLIC_SERVICES, Gateway
from treadle_gateway.settings import GatewaySettings
from treadle_service.server import ServiceHost


def make_interceptors(settings: GatewaySettings) -> Sequence[grpc.aio.ServerInterceptor]:
    """Returns the interceptors of a gateway: authentication, which also turns exceptions into statuses."""
    token = settings.internal_token.get_secret_value()
    limits = CallLimits(
        settings.max_calls,
        settings.max_calls_per_tenant,
        settings.max_streams_per_tenant,
        settings.max_requests_per_tenant,
    )
    return [
        AuthInterceptor(
            Authenticator(settings.store_address, token, settings.key_cache_seconds, limits, settings.client_tls)
        )
    ]


@contextlib.asynccontextmanager
async def build(host: ServiceHost, settings: GatewaySettings) -> AsyncIterator[None]:
    """Serves the public services on `host`, and the faces over HTTP; ready once the store has named the workers."""
    upstreams = Upstreams(settings.client_tls)
    forwarder = Forwarder(upstreams)
    directory = Directory(settings, upstreams.channel(settings.store_address))
    gateway = Gateway(directory, forwarder, settings.store_address)
    host.server.add_generic_rpc_handlers(gateway.generic_handlers())
    for service in PUBLIC_SERVICES:
        host.add_service(service.full_name)
    host.metrics.add(*readings(directory, forwarder))

    async def on_refresh() -> None:
        await host.set_ready(True)
        await gateway.cut_lost_streams()
        live = frozenset(worker.address for worker in directory.table.workers)
        await upstreams.retain(live | {settings.store_address})

    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(upstreams.close)
        if settings.http_listen:
            await stack.enter_async_context(_serving_http(host, settings, gateway, directory))
        # Half of the grace for streams, so that the calls that follow them still have some.
        host.on_drain(lambda: forwarder.end_streams(settings.drain_grace_seconds / 2))
        await host.start()
        watching = asyncio.create_task(directory.keep_fresh(on_refresh))
        stack.push_async_callback(_cancelled, watching)
        yield


@contextlib.asynccontextmanager
async def _serving_http(
    host: ServiceHost, settings: GatewaySettings, gateway: Gateway, directory: Directory
) -> AsyncIterator[None]:
    authenticator = next(i.authenticator for i in host.interceptors if isinstance(i, AuthInterceptor))

    def address() -> str:
        return settings.jobs_address or f"{'https://' if settings.http_tls else ''}{host.address}"

    calls = LocalCalls(gateway.handlers(), authenticator)
    faces = make_faces(HttpGateway(settings, calls, directory, authenticator, address))
    server = HttpServer(make_app(faces, authenticator), settings)
    host.on_drain(server.stop)
    for face in faces:
        if face.on_drain is not None:
            host.on_drain(face.on_drain)
    async with server.serving():
        host.http_address = server.address
        yield


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
