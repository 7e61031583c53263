"""A whole Treadle on this machine: the four services as real processes on loopback ports.

Each can be killed and started again at the same address. Knows nothing of what a test does with them.
"""

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from treadle.v1 import admin_pb2, admin_pb2_grpc

ROLES = ("store", "trainer", "sampler", "gateway")
START_SECONDS = 90.0


def free_port() -> int:
    """Returns a port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Cluster:
    """Four services over one data folder."""

    def __init__(self, folder: Path, base: str = "pip", settings: dict[str, str] | None = None) -> None:
        self.folder = folder
        self.addresses = {role: f"127.0.0.1:{free_port()}" for role in ROLES}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._token = secrets.token_hex(16)
        self._extra = settings or {}
        self._base = base
        self._tenants = 0

    def environment(self, role: str) -> dict[str, str]:
        """Returns the environment that a role starts with."""
        prefix = f"TREADLE_{role.upper()}_"
        values = {"LISTEN": self.addresses[role], "INTERNAL_TOKEN": self._token, "DRAIN_GRACE_SECONDS": "5"}
        if role == "store":
            values["DATA_DIR"] = str(self.folder)
        else:
            values["STORE_ADDRESS"] = self.addresses["store"]
        if role in ("trainer", "sampler"):
            values |= {"BASE": self._base, "DTYPE": "float32", "THREADS": "1", "WORKER": f"{role}-0"}
        own = {prefix + key: value for key, value in values.items()}
        extra = {key: value for key, value in self._extra.items() if key.startswith(prefix)}
        shared = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
        return {**os.environ, **shared, **own, **extra}

    def launch(self, role: str) -> None:
        """Starts a role's process without waiting for it."""
        with (self.folder / f"{role}.log").open("ab") as log:
            command = [sys.executable, "-m", f"treadle_{role}"]
            self.processes[role] = subprocess.Popen(command, env=self.environment(role), stdout=log, stderr=log)

    def wait_ready(self, roles: Iterable[str] = ROLES) -> None:
        """Waits until the roles say that they are ready."""
        deadline = time.monotonic() + START_SECONDS
        for role in roles:
            with grpc.insecure_channel(self.addresses[role]) as channel:
                stub = health_pb2_grpc.HealthStub(channel)
                while not self._ready(stub):
                    assert self.processes[role].poll() is None, f"{role} ended:\n{self.log_of(role)}"
                    assert time.monotonic() < deadline, f"{role} is not ready:\n{self.log_of(role)}"
                    time.sleep(0.05)

    @staticmethod
    def _ready(stub: health_pb2_grpc.HealthStub) -> bool:
        try:
            answer = stub.Check(health_pb2.HealthCheckRequest(service="readiness"), timeout=2, wait_for_ready=True)
        except grpc.RpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    def start(self) -> None:
        """Starts all four and waits until they are ready."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for role in ROLES:
            self.launch(role)
        self.wait_ready()

    def kill(self, role: str) -> None:
        """Kills a role's process as a crash would (SIGKILL)."""
        process = self.processes.pop(role)
        process.kill()
        process.wait()

    def stop(self, role: str) -> int:
        """Asks a role to drain and returns its exit code."""
        process = self.processes.pop(role)
        process.send_signal(signal.SIGTERM)
        return process.wait(timeout=60)

    def close(self) -> None:
        """Ends all processes, the store last."""
        for role in reversed(ROLES):
            process = self.processes.pop(role, None)
            if process is not None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(timeout=20)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()

    def log_of(self, role: str) -> str:
        """Returns the end of a role's log."""
        return (self.folder / f"{role}.log").read_text(errors="replace")[-4000:]

    @property
    def gateway_address(self) -> str:
        """Where users connect."""
        return self.addresses["gateway"]

    @property
    def admin_key(self) -> str:
        """The key that the store made at its first start."""
        return (self.folder / "admin.key").read_text().strip()

    def new_tenant(self, scopes: Iterable[str] = ("train", "sample")) -> str:
        """Makes a new tenant and returns an API key of it."""
        self._tenants += 1
        tenant = f"tenant-{self._tenants}-{secrets.token_hex(3)}"
        metadata = (("authorization", f"Bearer {self.admin_key}"),)
        with grpc.insecure_channel(self.gateway_address) as channel:
            admin = admin_pb2_grpc.AdminServiceStub(channel)
            admin.CreateTenant(admin_pb2.CreateTenantRequest(tenant=tenant), metadata=metadata, timeout=10)
            request = admin_pb2.CreateKeyRequest(tenant=tenant, scopes=list(scopes))
            return str(admin.CreateKey(request, metadata=metadata, timeout=10).secret)
