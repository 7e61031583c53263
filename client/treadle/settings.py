"""The SDK's settings: the only module of the client that reads the environment.

TREADLE_ADDRESS    host:port of the gateway; https://host:port for TLS
TREADLE_API_KEY    the key that says who you are
TREADLE_CA         PEM file of the authority that signed the gateway's certificate; the system's when unset
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

DEFAULT_ADDRESS: Final = "127.0.0.1:7600"


@dataclass(frozen=True)
class ClientSettings:
    """Where to connect, as whom, and how patiently; times in seconds."""

    address: str
    api_key: str
    ca_file: str = ""
    # A service that has answered before is waited for this long, over restarts; one that never has, not so long.
    retry_seconds: float = 120.0
    first_contact_seconds: float = 5.0
    # A run's stream gives up after this long without a connection or a result; a call that is over a limit of the
    # service, or of the tenant's quota, waits as the service says and gives up after this long.
    give_up_after_seconds: float = 600.0
    # Longest wait for one answer of a control call, and of a sampling call.
    call_seconds: float = 60.0
    sample_seconds: float = 600.0
    # Operations that a caller may pile up before its next call waits.
    max_backlog_bytes: int = 256 * 2**20


def client_settings(
    address: str | None = None, api_key: str | None = None, ca_file: str | Path | None = None
) -> ClientSettings:
    """Returns the settings, from the arguments or else from the environment."""
    return ClientSettings(
        address=address or os.environ.get("TREADLE_ADDRESS") or DEFAULT_ADDRESS,  # noqa: TID251 - this is the place.
        api_key=api_key or os.environ.get("TREADLE_API_KEY") or "",  # noqa: TID251
        ca_file=str(ca_file or os.environ.get("TREADLE_CA") or ""),  # noqa: TID251
    )
