"""TLS: what a service shows to its callers and to the services that it calls, and where plaintext is allowed.

Between services both sides show a certificate of the deployment's own authority, under one name that all of them
carry: their addresses may be anything. A server reads its certificate anew when the file changes, so that it can be
rotated without a restart; a channel reads when it is opened. Knows nothing of keys and tenants.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

import grpc

from treadle_service.logs import get_logger

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A certificate chain and its private key, both PEM files."""

    certificate: Path
    key: Path


@dataclass(frozen=True, slots=True)
class ServerTls:
    """How a service is served; with `client_authority` callers must show a certificate of it."""

    pair: KeyPair
    client_authority: Path | None = None

    def credentials(self) -> grpc.ServerCredentials:
        """Returns credentials that follow the files. Raises SystemExit when they cannot be read."""
        try:
            seen = self._stamp()
            first = self._load()
        except OSError as error:
            raise SystemExit(f"the certificate cannot be read: {error}") from error

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            # Called at every handshake; None keeps what was there.
            nonlocal seen
            try:
                now = self._stamp()
                if now == seen:
                    return None
                fresh = self._load()
            except OSError as error:
                log.warning("certificate_unreadable", cause=str(error))
                return None
            seen = now
            log.info("certificate_reloaded", file=str(self.pair.certificate))
            return fresh

        return grpc.dynamic_ssl_server_credentials(
            first,
            fetch,  # type: ignore[arg-type]  # The stub does not know that None is an answer.
            require_client_authentication=self.client_authority is not None,
        )

    def _stamp(self) -> tuple[tuple[int, int, int], ...]:
        files = [self.pair.certificate, self.pair.key, *([self.client_authority] if self.client_authority else [])]
        return tuple((stat.st_ino, stat.st_mtime_ns, stat.st_size) for stat in (file.stat() for file in files))

    def _load(self) -> grpc.ServerCertificateConfiguration:
        pair = (self.pair.key.read_bytes(), self.pair.certificate.read_bytes())
        authority = self.client_authority.read_bytes() if self.client_authority else None
        return grpc.ssl_server_certificate_configuration([pair], root_certificates=authority)


@dataclass(frozen=True, slots=True)
class ClientTls:
    """How a service calls others: whom it believes, what it shows, and the name that they must have."""

    authority: Path
    pair: KeyPair
    server_name: str

    def credentials(self) -> grpc.ChannelCredentials:
        """Returns credentials from the files as they are now."""
        return grpc.ssl_channel_credentials(
            self.authority.read_bytes(), self.pair.key.read_bytes(), self.pair.certificate.read_bytes()
        )


def is_loopback(address: str) -> bool:
    """Tells whether host:port can be reached from this machine alone."""
    if address.startswith(("unix:", "unix-abstract:")):
        return True
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
