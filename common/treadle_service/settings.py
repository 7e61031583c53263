"""Settings that every service has, read once from the environment and the command line.

Each role subclasses ServiceSettings with its own prefix `TREADLE_<ROLE>_`. This is the only place where services
read the environment.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self, TypeVar

from pydantic import Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, CliApp, SettingsConfigDict

from treadle_service.tls import ClientTls, KeyPair, ServerTls, is_loopback


class ServiceSettings(BaseSettings):
    """Settings of any service; frozen once read."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", cli_kebab_case=True, cli_hide_none_type=True)

    listen: str = Field("127.0.0.1:0", description="host:port to serve gRPC on; port 0 takes a free one")
    advertise: str = Field("", description="host:port under which other services reach this one; default: as bound")
    internal_token: SecretStr = Field(SecretStr(""), description="secret that the services of a deployment share")
    log_format: Literal["console", "json"] = Field("console", description="readable lines or one JSON object per line")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least level that is logged")
    drain_grace_seconds: float = Field(10.0, ge=0, description="time that running calls get after SIGTERM")
    allow_failpoints: bool = Field(False, description="for tests of this deployment: failpoints may be armed")
    failpoints: str = Field("", description="NAME=kill, NAME=sleep:SECONDS or NAME=raise:REASON, @VISIT; for tests")
    address_file: Path | None = Field(None, description="file that receives the bound host:port once serving")
    service_cert: Path | None = Field(None, description="PEM certificate that this service shows to other services")
    service_key: Path | None = Field(None, description="PEM private key of service_cert")
    service_ca: Path | None = Field(None, description="PEM authority whose certificates other services must show")
    service_name: str = Field("treadle.internal", description="DNS name that the certificates of all services carry")
    health_listen: str = Field(
        "", description="host:port to answer health checks on, alone and in plaintext: Kubernetes' probes know no TLS"
    )
    metrics_listen: str = Field("", description="host:port to serve Prometheus metrics on over HTTP; default: nowhere")
    trace_endpoint: str = Field(
        "", description="OTLP receiver of traces over gRPC, http://host:port or https://host:port; default: no traces"
    )
    trace_ratio: float = Field(
        0.01, ge=0, le=1, description="share of operations and calls that are traced; the same on all services"
    )
    allow_plaintext: bool = Field(False, description="serve and call without TLS beyond this machine too")

    @model_validator(mode="after")
    def _check_tls(self) -> Self:
        parts = (self.service_cert, self.service_key, self.service_ca)
        if any(parts) and not all(parts):
            raise ValueError("service_cert, service_key and service_ca belong together: set all three or none")
        return self

    @property
    def role(self) -> str:
        """What the service is: gateway, trainer, sampler or store."""
        return self.model_config.get("env_prefix", "").removeprefix("TREADLE_").rstrip("_").lower()

    @property
    def client_tls(self) -> ClientTls | None:
        """How other services are called; None for plaintext."""
        if self.service_cert is None or self.service_key is None or self.service_ca is None:
            return None
        return ClientTls(self.service_ca, KeyPair(self.service_cert, self.service_key), self.service_name)

    @property
    def server_tls(self) -> ServerTls | None:
        """How this service is served; None for plaintext."""
        if self.service_cert is None or self.service_key is None:
            return None
        return ServerTls(KeyPair(self.service_cert, self.service_key), self.service_ca)

    @property
    def peers(self) -> tuple[str, ...]:
        """Addresses of other services that are set here."""
        return ()

    def check_plaintext(self) -> None:
        """Raises SystemExit when keys and data would leave this machine in the clear, unless that is allowed."""
        if self.allow_plaintext:
            return
        if self.server_tls is None and not is_loopback(self.listen):
            raise SystemExit(
                f"{self.listen} is reached from other machines: set certificates, or allow_plaintext if the network "
                "itself is trusted"
            )
        far = [peer for peer in self.peers if not is_loopback(peer)]
        if self.client_tls is None and far:
            raise SystemExit(
                f"{far[0]} is on another machine: set service_cert, service_key and service_ca, or allow_plaintext if "
                "the network itself is trusted"
            )


SettingsT = TypeVar("SettingsT", bound=ServiceSettings)


def load_settings(settings: type[SettingsT], arguments: Sequence[str] | None = None) -> SettingsT:
    """Returns the settings from the environment, overridden by flags (`--listen 0.0.0.0:7600`).

    Args:
        settings: the role's class.
        arguments: the flags without the program's name; None reads the command line, [] reads none.

    Raises:
        SystemExit: a flag is unknown or a value is out of range; the reason goes to standard error.
    """
    return CliApp.run(settings, cli_args=None if arguments is None else list(arguments))
