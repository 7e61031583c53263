"""Settings of the gateway, prefix TREADLE_GATEWAY_."""

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator
from pydantic_settings import SettingsConfigDict

from treadle_service.settings import ServiceSettings
from treadle_service.tls import KeyPair, ServerTls, is_loopback


class GatewaySettings(ServiceSettings):
    """What a gateway needs to know beyond what every service does."""

    model_config = SettingsConfigDict(env_prefix="TREADLE_GATEWAY_")

    listen: str = Field("127.0.0.1:7600", description="host:port to serve gRPC on; port 0 takes a free one")
    http_listen: str = Field(
        "127.0.0.1:7680", description="host:port to serve HTTP on; port 0 takes a free one, empty serves none"
    )
    http_address_file: Path | None = Field(None, description="file that receives the bound host:port of HTTP")
    model_aliases: dict[str, str] = Field(
        {}, description="further names of bases over HTTP, as JSON: name to the base that it means"
    )
    max_samples_per_tenant: int = Field(
        4096, ge=1, description="sampling requests that one tenant may have under way over the Tinker face"
    )
    dashboard: bool = Field(True, description="serve the dashboard under / of HTTP")
    price_per_million_tokens: float = Field(
        0.0,
        ge=0,
        description="price that the dashboard shows of tokens, trained and sampled alike; 0 for none",
    )
    jobs_dir: Path | None = Field(
        None, description="folder for files that jobs were started with on the dashboard; unset: a temporary one"
    )
    jobs_address: str = Field(
        "", description="host:port or https://host:port under which jobs reach this gateway; empty: where it listens"
    )
    max_jobs: int = Field(4, ge=0, description="jobs that run at once beside this gateway; 0 for none")
    max_jobs_per_tenant: int = Field(2, ge=0, description="of those, jobs of one tenant")
    max_upload_bytes: int = Field(64 * 2**20, ge=1, description="longest file that a job may be started with")
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

    max_requests_per_tenant: int = Field(
        4096, ge=1, description="HTTP requests that one tenant may have open at once, long polls included"
    )

    @model_validator(mode="after")
    def _check_pair(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key belong together: set both or none")
        return self

    @property
    def server_tls(self) -> ServerTls | None:
        """How clients are served: they show a key, not a certificate."""
        return None if self.http_tls is None else ServerTls(self.http_tls)

    @property
    def http_tls(self) -> KeyPair | None:
        """What HTTP clients are shown: the certificate that gRPC clients are."""
        if self.tls_cert is None or self.tls_key is None:
            return None
        return KeyPair(self.tls_cert, self.tls_key)

    def check_plaintext(self) -> None:
        """The same for HTTP."""
        super().check_plaintext()
        if (
            self.http_listen
            and not self.allow_plaintext
            and self.http_tls is None
            and not is_loopback(self.http_listen)
        ):
            raise SystemExit(
                f"{self.http_listen} is reached from other machines: set tls_cert and tls_key, or allow_plaintext if "
                "the network itself is trusted"
            )

    @property
    def peers(self) -> tuple[str, ...]:
        """Addresses of other services that are set here."""
        return (self.store_address,)
