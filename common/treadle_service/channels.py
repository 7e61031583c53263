"""Channels between services, with the options that were measured to matter, and the metadata of internal calls.

Knows nothing of what is called.
"""

from typing import Final

import grpc

from treadle.channel import CHANNEL_OPTIONS
from treadle_service import request_ids
from treadle_service.principal import Principal
from treadle_service.tls import ClientTls
from treadle_service.tracing import HEADER, TRACING

Metadata = tuple[tuple[str, str], ...]

SERVER_OPTIONS: Final = (
    ("grpc.so_reuseport", 0),
    ("grpc.http2.lookahead_bytes", 16 * 2**20),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    # A client whose last call has just ended may still ping; without this that counts against it for two hours.
    ("grpc.keepalive_permit_without_calls", 1),
    # Long polls of a gateway share one connection to each worker.
    ("grpc.max_concurrent_streams", 8192),
)


# Peers are few and near. One that was started again must be found at once: until the pause between two attempts to
# connect is over, every call to it fails, and its runs stand still.
PEER_OPTIONS: Final = (
    *((name, value) for name, value in CHANNEL_OPTIONS if name != "grpc.max_reconnect_backoff_ms"),
    ("grpc.max_reconnect_backoff_ms", 200),
)


def open_channel(address: str, tls: ClientTls | None = None) -> grpc.aio.Channel:
    """Returns a new channel to `address`, plaintext without `tls`; connects on first use and again after a loss."""
    if tls is None:
        return grpc.aio.insecure_channel(address, options=PEER_OPTIONS)
    options = (*PEER_OPTIONS, ("grpc.ssl_target_name_override", tls.server_name))
    return grpc.aio.secure_channel(address, tls.credentials(), options=options)


def internal_metadata(token: str, principal: Principal | None = None) -> Metadata:
    """Returns the metadata of a call between services, made for `principal` if there is one."""
    metadata: Metadata = (("authorization", f"Bearer {token}"), *_context())
    if principal is None:
        return metadata
    scopes = ",".join(sorted(principal.scopes))
    return (*metadata, ("x-treadle-tenant", principal.tenant), ("x-treadle-scopes", scopes))


def _context() -> Metadata:
    """Returns the ids under which the call that runs in this task is found in logs and traces."""
    request_id, traceparent = request_ids.current(), TRACING.header()
    found = ((request_ids.HEADER, request_id), (HEADER, traceparent))
    return tuple((name, value) for name, value in found if value)
