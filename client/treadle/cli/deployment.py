"""The services of `treadle up` as child processes: their names, addresses, settings and order.

Knows nothing of how children are kept running.
"""

import secrets
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from treadle.cli.supervisor import ChildSpec, service_command

# The store starts first and ends last; the gateway lets callers in last and out first.
STAGES: Final = {"store": 0, "trainer": 1, "sampler": 1, "gateway": 2}
LOOPBACK_HOSTS = frozenset({"127.0.0.1", "localhost", "::1", "[::1]"})
# Below the ports that the kernel hands to outgoing connections: a child that is started again finds its port free.
_FREE_PORTS = range(20_000, 32_000)
_OFFSETS = {"gateway": 0, "http": 80, "trainer": 10, "sampler": 20, "store": 30}
# What people wrote into their programs: no other port will do.
_FIXED = frozenset({"gateway", "http"})
_BITS = ("int8", "nf4")
_GRACE_SECONDS = {"gateway": 2.0, "trainer": 8.0, "sampler": 2.0, "store": 2.0}


@dataclass(frozen=True)
class ChosenBase:
    """A base as a person named it, and the bits of its frozen linears."""

    base: str
    quantize: str

    @classmethod
    def parse(cls, text: str, quantize: str) -> "ChosenBase":
        """Reads `BASE`, which has the bits `quantize`, or `BASE@int8` and `BASE@nf4`."""
        base, mark, bits = text.rpartition("@")
        return cls(base, bits) if mark and bits in _BITS else cls(text, quantize)


@dataclass(frozen=True)
class Deployment:
    """What a person chose; `trainers` and `samplers` of each base."""

    bases: tuple[ChosenBase, ...]
    trainers: int
    samplers: int
    data_dir: Path
    cache_dir: Path
    host: str
    allow_plaintext: bool
    port: int
    threads: int
    dtype: str
    log_level: str
    addresses: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Chooses the addresses: `port`, port + 80 for HTTP, and others; free ones for services, or if `port` is 0.

        Raises OSError when one of the first two is taken.
        """
        for name in ("gateway", "http", *(name for name in self.names if name != "gateway")):
            host = self.host if name in _FIXED else "127.0.0.1"
            # Only the first of several workers: what follows its port is the next role's.
            fixed = self.port + _OFFSETS[name] if self.port and name in _OFFSETS else 0
            taken = set(self.addresses.values())
            usable = fixed != 0 and _is_free(host, fixed)
            if name in _FIXED and fixed and not usable:
                raise OSError(f"port {fixed} of {host} is taken; give another --port, or 0 for free ones")
            self.addresses[name] = f"{host}:{fixed if usable else _free_port(host, taken)}"

    @property
    def workers(self) -> dict[str, ChosenBase]:
        """The trainers and samplers by the names of their processes: `trainer`, `trainer-1` and so on."""
        found: dict[str, ChosenBase] = {}
        for role, count in (("trainer", self.trainers), ("sampler", self.samplers)):
            bases = [base for base in self.bases for _ in range(count)]
            found |= {role if not number else f"{role}-{number}": base for number, base in enumerate(bases)}
        return found

    @property
    def names(self) -> list[str]:
        """The names of all processes, in the order of their start."""
        return ["store", *self.workers, "gateway"]

    def children(self, environment: Mapping[str, str], parent_pid: int) -> list[ChildSpec]:
        """Returns the processes with a fresh internal token."""
        token = secrets.token_urlsafe(32)
        return [
            ChildSpec(
                name=name,
                command=service_command(f"treadle_{role_of(name)}", parent_pid),
                address=self.addresses[name],
                stage=STAGES[role_of(name)],
                environment={**environment, **self._libraries(), **self._settings(name, token)},
            )
            for name in self.names
        ]

    def _libraries(self) -> dict[str, str]:
        threads = str(self.threads)
        # Passive: idle OpenMP threads must not spin, several torch processes share these cores. No progress bars: they
        # make no sense in a log.
        return {
            "OMP_WAIT_POLICY": "PASSIVE",
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "TQDM_DISABLE": "1",
        }

    def _settings(self, name: str, token: str) -> dict[str, str]:
        role = role_of(name)
        values = {
            "LISTEN": self.addresses[name],
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
        if name in self.workers:
            chosen = self.workers[name]
            values |= {
                "BASE": chosen.base,
                "DTYPE": self.dtype,
                "QUANTIZE": chosen.quantize,
                "THREADS": str(self.threads),
                "CACHE_DIR": str(self.cache_dir),
                "WORKER": f"{role}-0" if name == role else name,
                "SHARED_BLOBS": str(self.data_dir / "blobs"),
            }
        return {f"TREADLE_{role.upper()}_{key}": value for key, value in values.items()}


def role_of(name: str) -> str:
    """Returns what a process is: `trainer` of `trainer-1`."""
    return name.partition("-")[0]


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
