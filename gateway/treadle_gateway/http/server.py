"""Uvicorn on the gateway's own event loop: bound, served, drained with the gateway.

Follows the same certificates as the gRPC side, and its rule that plaintext stays on this machine. Knows nothing of
what the application does.
"""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from typing import Final

import uvicorn
from starlette.types import ASGIApp

from treadle_gateway.settings import GatewaySettings
from treadle_service.logs import get_logger
from treadle_service.tls import KeyPair

log = get_logger(__name__)
_BACKLOG: Final = 4096
_KEEP_ALIVE_SECONDS: Final = 75


class HttpServer:
    """One listening socket and its connections."""

    def __init__(self, app: ASGIApp, settings: GatewaySettings) -> None:
        self._settings = settings
        self._app = app
        self.address = ""
        self._server: _Server | None = None

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Serves inside the running loop; SystemExit when it may not or cannot."""
        settings = self._settings
        settings.check_plaintext()
        bound = _bind(settings.http_listen)
        host, port = settings.http_listen.rpartition(":")[0], bound.getsockname()[1]
        self.address = f"{host}:{port}"
        config = uvicorn.Config(
            self._app,
            http="httptools",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=max(1, round(settings.drain_grace_seconds)),
        )
        config.load()
        config.ssl = None if settings.http_tls is None else following_context(settings.http_tls)
        self._server = _Server(config)
        task = asyncio.create_task(self._server.serve(sockets=[bound]))
        try:
            while not self._server.started and not task.done():
                await asyncio.sleep(0.01)
            if settings.http_address_file is not None:
                settings.http_address_file.write_text(self.address)
            log.info("serving_http", address=self.address)
            yield
        finally:
            self._server.should_exit = True
            await task

    async def stop(self) -> None:
        """Takes no new requests; those that run may end. What a context's end waits for begins here."""
        if self._server is not None:
            self._server.should_exit = True


class _Server(uvicorn.Server):
    """Leaves signals to the service that it is part of."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _bind(listen: str) -> socket.socket:
    """Returns a listening socket; SystemExit when the address is taken or none of this machine."""
    host, _, port = listen.rpartition(":")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(_BACKLOG)
    except (OSError, ValueError) as error:
        raise SystemExit(f"cannot serve HTTP on {listen!r}: {error}; set http_listen") from error
    bound.setblocking(False)
    return bound


def following_context(pair: KeyPair) -> ssl.SSLContext:
    """Returns a context that shows a changed certificate at the next handshake; SystemExit if there is none."""
    try:
        seen = _stamp(pair)
        outer = _context(pair)
    except (OSError, ssl.SSLError) as error:
        raise SystemExit(f"the certificate cannot be read: {error}") from error
    shown = _context(pair)

    def on_handshake(connection: ssl.SSLObject, _: str | None, __: ssl.SSLContext) -> None:
        nonlocal seen, shown
        try:
            now = _stamp(pair)
            if now != seen:
                shown, seen = _context(pair), now
                log.info("certificate_reloaded", file=str(pair.certificate))
        except (OSError, ssl.SSLError) as error:
            # Between two files of one rotation: the pair that was there is shown once more.
            log.warning("certificate_unreadable", cause=str(error))
        # This handshake has taken what it shows from the outer context already; this is the way to change it.
        connection.context = shown

    outer.sni_callback = on_handshake
    return outer


def _context(pair: KeyPair) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(["http/1.1"])
    context.load_cert_chain(pair.certificate, pair.key)
    return context


def _stamp(pair: KeyPair) -> tuple[tuple[int, int, int], ...]:
    return tuple((s.st_ino, s.st_mtime_ns, s.st_size) for s in (pair.certificate.stat(), pair.key.stat()))
