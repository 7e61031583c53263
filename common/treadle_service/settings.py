"""Settings that every service has, read once from the environment and the command line.

Each role subclasses ServiceSettings with its own prefix `TREADLE_<ROLE>_`. This is the only place where services
read the environment.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, CliApp, SettingsConfigDict


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
