"""Settings of the gateway, prefix TREADLE_GATEWAY_."""

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator
from pydantic_settings import SettingsConfigDict

from treadle_service.settings import ServiceSettings
from treadle_service.tls import KeyPair, ServerTls


class GatewaySettings(ServiceSettings):
    """What a gateway needs to know beyond what every service does."""

    model_config = SettingsConfigDict(env_prefix="TREADLE_GATEWAY_")

    listen: str = Field("127.0.0.1:7600", description="host:port to serve gRPC on; port 0 takes a free one")
    store_address: str = Field("127.0.0.1:7630", description="host:port of the adapter store")
    refresh_seconds: float = Field(1.0, gt=0, description="time between two looks at the list of live workers")
    key_cache_seconds: float = Field(
        1.0, ge=0, description="how long a key that another gateway revoked, or that expired, may still be taken"
    )
    route_cache_seconds: float = Field(2.0, ge=0, description="how long a run's place is remembered")
    tls_cert: Path | None = Field(None, description="PEM certificate chain that clients are shown")
    tls_key: Path | None = Field(None, description="PEM private key of tls_cert")
    max_calls: int = Field(8192, ge=1, description="calls and streams open at once; beyond it QUEUE_FULL")
    max_calls_per_tenant: int = Field(512, ge=1, description="calls that one tenant may have open at once")
    max_streams_per_tenant: int = Field(
        512, ge=1, description="operation streams that one tenant may have open at once"
    )

    @model_validator(mode="after")
    def _check_pair(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key belong together: set both or none")
        return self

    @property
    def server_tls(self) -> ServerTls | None:
        """How clients are served: they show a key, not a certificate."""
        if self.tls_cert is None or self.tls_key is None:
            return None
        return ServerTls(KeyPair(self.tls_cert, self.tls_key))

    @property
    def peers(self) -> tuple[str, ...]:
        """Addresses of other services that are set here."""
        return (self.store_address,)
