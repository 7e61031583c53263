"""Builds, runs and drains a grpc.aio server with health, reflection and signals.

A role gives `build(host, settings)`, an async context manager that adds its servicers to `host.server` and starts
its background work. Knows nothing of what is served.

Draining: readiness turns NOT_SERVING, the drain callbacks run (finish, snapshot, hand over), the server stops with
its grace, then the role's context manager cleans up.
"""

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from treadle_service import failpoints
from treadle_service.channels import SERVER_OPTIONS
from treadle_service.interceptors import ErrorInterceptor
from treadle_service.logs import configure_logging, get_logger
from treadle_service.metrics import Reading, ServiceMetrics
from treadle_service.settings import ServiceSettings, SettingsT, load_settings
from treadle_service.tracing import TRACING

log = get_logger(__name__)
_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

DrainCallback = Callable[[], Awaitable[None]]


class ServiceHost:
    """One gRPC server with its health and its way out."""

    def __init__(self, settings: ServiceSettings, interceptors: Sequence[grpc.aio.ServerInterceptor] = ()) -> None:
        self.settings = settings
        self.interceptors = interceptors
        self.draining = asyncio.Event()
        self.address = ""
        self.http_address = ""
        self.server = grpc.aio.server(
            interceptors=[*interceptors] or [ErrorInterceptor()],
            options=SERVER_OPTIONS,
        )
        self.metrics = ServiceMetrics()
        self.metrics.add_build(settings.role)
        self.metrics.add(
            Reading("treadle_ready", "Whether the service takes work", lambda: float(self._ready)),
            Reading("treadle_draining", "Whether the service is about to stop", lambda: float(self.draining.is_set())),
        )
        self.health_address = ""
        """Where health checks are answered alone; empty for nowhere."""
        self.metrics_port = 0
        """Where the metrics are served; 0 for nowhere."""
        self._ready = False
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.server)
        self._probed: grpc.aio.Server | None = None
        """A second server for health checks alone."""
        self._services = [health.SERVICE_NAME, reflection.SERVICE_NAME]
        self._callbacks: list[DrainCallback] = []

    def add_service(self, full_name: str) -> None:
        """Names a service for reflection."""
        self._services.append(full_name)

    def on_drain(self, callback: DrainCallback) -> None:
        """Has `callback` awaited when the service drains, before calls are cut off; first added, first called."""
        self._callbacks.append(callback)

    @property
    def advertised(self) -> str:
        """host:port under which other services reach this one; empty until started."""
        return self.settings.advertise or self.address

    async def start(self) -> None:
        """Binds and serves; alive but not ready. Raises RuntimeError when the address is taken.

        SystemExit when it would serve other machines in plaintext, or its certificate cannot be read.
        """
        reflection.enable_server_reflection(self._services, self.server)
        host = self.settings.listen.rpartition(":")[0]
        self.settings.check_plaintext()
        tls = self.settings.server_tls
        if tls is None:
            port = self.server.add_insecure_port(self.settings.listen)
        else:
            port = self.server.add_secure_port(self.settings.listen, tls.credentials())
        self.address = f"{host}:{port}"
        await self._health.set("liveness", _SERVING)
        await self.set_ready(False)
        await self._start_probed()
        await self.server.start()
        if self.settings.address_file is not None:
            self.settings.address_file.write_text(self.address)
        log.info("serving", address=self.address)

    async def _start_probed(self) -> None:
        if not self.settings.health_listen:
            return
        self._probed = grpc.aio.server(options=SERVER_OPTIONS)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._probed)
        host = self.settings.health_listen.rpartition(":")[0]
        port = self._probed.add_insecure_port(self.settings.health_listen)
        self.health_address = f"{host}:{port}"
        await self._probed.start()

    async def set_ready(self, ready: bool) -> None:
        """Answers health checks of "" and "readiness"; never ready again once draining."""
        self._ready = ready and not self.draining.is_set()
        status = _SERVING if self._ready else _NOT_SERVING
        await self._health.set("", status)
        await self._health.set("readiness", status)

    async def drain(self) -> None:
        """Stops taking work, lets what runs finish, and stops the server."""
        if self.draining.is_set():
            return
        self.draining.set()
        await self.set_ready(False)
        log.info("draining")
        for callback in self._callbacks:
            await callback()
        await self.server.stop(self.settings.drain_grace_seconds)
        if self._probed is not None:
            await self._probed.stop(0)


Build = Callable[[ServiceHost, SettingsT], AbstractAsyncContextManager[None]]
MakeInterceptors = Callable[[SettingsT], Sequence[grpc.aio.ServerInterceptor]]


@asynccontextmanager
async def serve_in_process(
    settings: SettingsT, build: Build[SettingsT], interceptors: Sequence[grpc.aio.ServerInterceptor] = ()
) -> AsyncIterator[ServiceHost]:
    """Serves inside the running loop until the context ends; then drains."""
    host = ServiceHost(settings, interceptors)
    with host.metrics.served(settings.metrics_listen) as port:
        host.metrics_port = port
        async with build(host, settings):
            try:
                yield host
            finally:
                await host.drain()


def run_service(
    role: str,
    settings_class: type[SettingsT],
    build: Build[SettingsT],
    make_interceptors: MakeInterceptors[SettingsT] = lambda _: (),
    arguments: Sequence[str] | None = None,
) -> None:
    """Runs a service as a process, from reading its settings until a signal has drained it.

    `build` adds servicers, calls `host.start()` as early as it can (so that liveness answers while it loads) and
    `host.set_ready(True)` when it can take work.
    """
    settings = load_settings(settings_class, arguments)
    configure_logging(role, settings.log_format, settings.log_level)
    if settings.trace_endpoint:
        TRACING.start(role, settings.trace_endpoint, settings.trace_ratio)
    try:
        failpoints.arm(settings.failpoints, allowed=settings.allow_failpoints)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    try:
        asyncio.run(_serve_until_signal(settings, build, make_interceptors(settings)))
    finally:
        TRACING.stop()


async def _serve_until_signal(
    settings: SettingsT, build: Build[SettingsT], interceptors: Sequence[grpc.aio.ServerInterceptor]
) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with contextlib.AsyncExitStack() as stack:
        serving = serve_in_process(settings, build, interceptors)
        starting = asyncio.ensure_future(_start(stack, serving))
        stopping = asyncio.ensure_future(stop.wait())
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await starting
            return
        refusal = starting.result()
        if refusal is not None:
            stopping.cancel()
            raise refusal
        await stopping
    log.info("stopped")


async def _start(
    stack: contextlib.AsyncExitStack, serving: AbstractAsyncContextManager[ServiceHost]
) -> SystemExit | None:
    """Enters the service; returns its refusal to start, which as a task's exception would end the loop in mid-air."""
    try:
        await stack.enter_async_context(serving)
    except SystemExit as refusal:
        return refusal
    return None
