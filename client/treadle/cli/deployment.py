"""The four services of `treadle up` as child processes: their addresses, their settings, their order.

Knows nothing of how children are kept running.
"""

import secrets
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from treadle.cli.supervisor import ChildSpec, service_command

# The store starts first and ends last; the gateway lets callers in last and out first.
STAGES = {"store": 0, "trainer": 1, "sampler": 1, "gateway": 2}
LOOPBACK_HOSTS = frozenset({"127.0.0.1", "localhost", "::1", "[::1]"})
# Below the ports that the kernel hands to outgoing connections: a child that is started again finds its port free.
_FREE_PORTS = range(20_000, 32_000)
_OFFSETS = {"gateway": 0, "http": 80, "trainer": 10, "sampler": 20, "store": 30}
# What people wrote into their programs: no other port will do.
_FIXED = frozenset({"gateway", "http"})
_GRACE_SECONDS = {"gateway": 2.0, "trainer": 8.0, "sampler": 2.0, "store": 2.0}


@dataclass(frozen=True)
class Deployment:
    """What a person chose."""

    base: str
    data_dir: Path
    cache_dir: Path
    host: str
    allow_plaintext: bool
    port: int
    threads: int
    dtype: str
    quantize: str
    log_level: str
    addresses: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Chooses the addresses: `port`, port + 80 for HTTP, and others; free ones for services, or if `port` is 0.

        Raises OSError when one of the first two is taken.
        """
        for role, offset in _OFFSETS.items():
            host = self.host if role in _FIXED else "127.0.0.1"
            fixed = self.port + offset if self.port else 0
            taken = set(self.addresses.values())
            usable = fixed != 0 and _is_free(host, fixed)
            if role in _FIXED and fixed and not usable:
                raise OSError(f"port {fixed} of {host} is taken; give another --port, or 0 for free ones")
            self.addresses[role] = f"{host}:{fixed if usable else _free_port(host, taken)}"

    def children(self, environment: Mapping[str, str], parent_pid: int) -> list[ChildSpec]:
        """Returns the four processes with a fresh internal token."""
        token = secrets.token_urlsafe(32)
        return [
            ChildSpec(
                name=role,
                command=service_command(f"treadle_{role}", parent_pid),
                address=self.addresses[role],
                stage=stage,
                environment={**environment, **self._libraries(), **self._settings(role, token)},
            )
            for role, stage in STAGES.items()
        ]

    def _libraries(self) -> dict[str, str]:
        threads = str(self.threads)
        # Passive: idle OpenMP threads must not spin, two torch processes share these cores. No progress bars: they
        # make no sense in a log.
        return {
            "OMP_WAIT_POLICY": "PASSIVE",
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "TQDM_DISABLE": "1",
        }

    def _settings(self, role: str, token: str) -> dict[str, str]:
        values = {
            "LISTEN": self.addresses[role],
            "INTERNAL_TOKEN": token,
            "LOG_LEVEL": self.log_level,
            "DRAIN_GRACE_SECONDS": str(_GRACE_SECONDS[role]),
        }
        if role == "store":
            values["DATA_DIR"] = str(self.data_dir)
        else:
            values["STORE_ADDRESS"] = self.addresses["store"]
        if role == "gateway":
            values["HTTP_LISTEN"] = self.addresses["http"]
            if self.allow_plaintext:
                values["ALLOW_PLAINTEXT"] = "true"
        if role in ("trainer", "sampler"):
            values |= {
                "BASE": self.base,
                "DTYPE": self.dtype,
                "QUANTIZE": self.quantize,
                "THREADS": str(self.threads),
                "CACHE_DIR": str(self.cache_dir),
                "WORKER": f"{role}-0",
                "SHARED_BLOBS": str(self.data_dir / "blobs"),
            }
        return {f"TREADLE_{role.upper()}_{key}": value for key, value in values.items()}


def _is_free(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _free_port(host: str, taken: set[str]) -> int:
    for _ in range(1000):
        port = secrets.choice(_FREE_PORTS)
        if f"{host}:{port}" not in taken and _is_free(host, port):
            return port
    raise OSError(f"no free port between {_FREE_PORTS.start} and {_FREE_PORTS.stop}")
