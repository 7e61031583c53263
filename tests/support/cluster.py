"""A whole Treadle on this machine: its services as real processes on loopback ports.

Each can be killed, frozen and started again at the same address, and connections to it cut. Knows nothing of what a
test does with them.
"""

import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import grpc
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.support.nursery import ForkedProcess
from tests.support.proxy import TroubleProxy
from treadle.v1 import admin_pb2, admin_pb2_grpc

ROLES = ("store", "trainer", "sampler", "gateway")
START_SECONDS = 240.0
GROUP_MANIFESTS = Path(__file__).parents[2] / "deploy/kustomize/components/leaderworkerset"
# A service that is being started refuses connections for a while.
CHANNEL_OPTIONS = (("grpc.initial_reconnect_backoff_ms", 50), ("grpc.max_reconnect_backoff_ms", 200))


_given_ports: set[int] = set()


def free_port() -> int:
    """Returns a port that was free a moment ago, and was not given before: that one may not be bound yet."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if port not in _given_ports:
            _given_ports.add(port)
            return port


def group_command(role: str, nodes: int, node: int, port: int, ranks: int, *options: str) -> list[str]:
    """Returns the command of the manifest for a group of nodes, for some nodes of `ranks` ranks on this machine."""
    text = (GROUP_MANIFESTS / f"{role}.yaml").read_text()
    template = yaml.safe_load(text)["spec"]["leaderWorkerTemplate"]["leaderTemplate"]
    program, *arguments = template["spec"]["containers"][0]["command"]
    values = {"LWS_GROUP_SIZE": str(nodes), "LWS_WORKER_INDEX": str(node), "LWS_LEADER_ADDRESS": "127.0.0.1"}
    arguments = [re.sub(r"\$\((\w+)\)", lambda found: values[found[1]], argument) for argument in arguments]
    # What stands later counts: fewer ranks than the nodes of a cluster have devices, and a port that is free here.
    place = arguments.index("--module")
    arguments[place:place] = [f"--nproc-per-node={ranks}", f"--master-port={port}", *options]
    return [str(Path(sys.executable).with_name(program)), *arguments]


class Cluster:
    """Services over one data folder, by name: those of ROLES, further workers as `trainer-1`, `sampler-1` and so on."""

    def __init__(
        self,
        folder: Path,
        base: str = "pip",
        settings: dict[str, str] | None = None,
        *,
        trainers: int = 1,
        samplers: int = 1,
        forked: bool = False,
        proxied: bool = False,
        ranks: Mapping[str, int] | None = None,
    ) -> None:
        """Prepares the services without starting any.

        Args:
            folder: where the store and the logs are.
            base: what the workers hold.
            settings: environment for those services whose prefix it has.
            trainers: how many there are.
            samplers: how many there are.
            forked: start processes from one that has imported everything, in tenths of a second.
            proxied: have every connection to a service go through a proxy of its own in `proxies`.
            ranks: services that are a group of so many ranks on this machine, and start again when one is lost.
        """
        self.folder = folder
        more = [f"trainer-{number}" for number in range(1, trainers)]
        self.names = (*ROLES, *more, *(f"sampler-{number}" for number in range(1, samplers)))
        self.addresses = {name: f"127.0.0.1:{free_port()}" for name in self.names}
        self.http_address = f"127.0.0.1:{free_port()}"
        self.processes: dict[str, subprocess.Popen[bytes] | ForkedProcess] = {}
        self.proxies: dict[str, TroubleProxy] = {}
        if proxied:
            self.proxies = {name: TroubleProxy(self.addresses[name]).__enter__() for name in self.names}
        self.token = secrets.token_hex(16)
        self._forked = forked
        self._ranks = dict(ranks or {})
        self._extra = settings or {}
        self._base = base
        self._tenants = 0

    def reach(self, name: str) -> str:
        """Returns the address under which others reach a service."""
        return self.proxies[name].address if self.proxies else self.addresses[name]

    def environment(self, name: str) -> dict[str, str]:
        """Returns the environment that a service starts with."""
        role = name.partition("-")[0]
        prefix = f"TREADLE_{role.upper()}_"
        values = {"LISTEN": self.addresses[name], "INTERNAL_TOKEN": self.token, "DRAIN_GRACE_SECONDS": "5"}
        if role == "store":
            values["DATA_DIR"] = str(self.folder)
        else:
            values["STORE_ADDRESS"] = self.reach("store")
        if role == "gateway":
            values["HTTP_LISTEN"] = self.http_address
        if role in ("trainer", "sampler"):
            worker = name if name != role else f"{role}-0"
            values |= {"BASE": self._base, "DTYPE": "float32", "THREADS": "1", "WORKER": worker}
            values["ADVERTISE"] = self.reach(name)
        own = {prefix + key: value for key, value in values.items()}
        extra = {key: value for key, value in self._extra.items() if key.startswith(prefix)}
        shared = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
        return {**os.environ, **shared, **own, **extra}

    def launch(self, name: str, **settings: str) -> None:
        """Starts a service without waiting for it; `settings` are further ones, without their prefix."""
        role, log = name.partition("-")[0], self.folder / f"{name}.log"
        extra = {f"TREADLE_{role.upper()}_{key.upper()}": value for key, value in settings.items()}
        environment = {**self.environment(name), **extra}
        if self._forked and name not in self._ranks:
            self.processes[name] = ForkedProcess(role, environment, log)
            return
        with log.open("ab") as out:
            command = [sys.executable, "-m", f"treadle_{role}"]
            if name in self._ranks:
                command = group_command(role, 1, 0, free_port(), self._ranks[name], "--max-restarts=3")
            self.processes[name] = subprocess.Popen(command, env=environment, stdout=out, stderr=out)

    def wait_ready(self, names: Iterable[str] = ()) -> None:
        """Waits until the services, all if none is named, say that they are ready."""
        deadline = time.monotonic() + START_SECONDS
        for role in names or self.names:
            with grpc.insecure_channel(self.addresses[role], options=CHANNEL_OPTIONS) as channel:
                stub = health_pb2_grpc.HealthStub(channel)
                while not self._ready(stub):
                    assert self.processes[role].poll() is None, f"{role} ended:\n{self.log_of(role)}"
                    assert time.monotonic() < deadline, f"{role} is not ready:\n{self.log_of(role)}"
                    time.sleep(0.05)
            # Else somebody else answered on its port.
            assert self.processes[role].poll() is None, f"{role} ended:\n{self.log_of(role)}"

    @staticmethod
    def _ready(stub: health_pb2_grpc.HealthStub) -> bool:
        try:
            answer = stub.Check(health_pb2.HealthCheckRequest(service="readiness"), timeout=2, wait_for_ready=True)
        except grpc.RpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    def start(self, *names: str) -> None:
        """Starts those that are named, or all, and waits until they are ready."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in names or self.names:
            self.launch(name)
        self.wait_ready(names)

    def kill(self, role: str) -> None:
        """Kills a role's process as a crash would (SIGKILL)."""
        process = self.processes.pop(role)
        process.kill()
        process.wait()

    def ranks_of(self, name: str) -> list[int]:
        """Returns the process ids of a group's ranks on this machine, by rank."""
        parent = self.processes[name].pid
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        by_rank = {}
        for child in children:
            variables = dict(
                line.split("=", 1) for line in Path(f"/proc/{child}/environ").read_text().split("\0") if "=" in line
            )
            by_rank[int(variables["RANK"])] = int(child)
        return [by_rank[rank] for rank in sorted(by_rank)]

    def freeze(self, name: str) -> None:
        """Stops a process as a long pause of its machine would (SIGSTOP)."""
        self.processes[name].send_signal(signal.SIGSTOP)

    def thaw(self, name: str) -> None:
        """Lets a frozen process go on (SIGCONT)."""
        self.processes[name].send_signal(signal.SIGCONT)

    def stop(self, role: str) -> int:
        """Asks a role to drain and returns its exit code."""
        process = self.processes.pop(role)
        process.send_signal(signal.SIGTERM)
        return process.wait(timeout=60)

    def close(self) -> None:
        """Ends all processes, the store last."""
        for names in (set(self.names) - {"store"}, {"store"}):
            ending = [self.processes.pop(name) for name in names & self.processes.keys()]
            for process in ending:
                process.send_signal(signal.SIGCONT)
                process.send_signal(signal.SIGTERM)
            for process in ending:
                try:
                    process.wait(timeout=20)
                except (subprocess.TimeoutExpired, TimeoutError):
                    process.kill()
                    process.wait()
        for proxy in self.proxies.values():
            proxy.__exit__(None, None, None)

    def log_of(self, role: str) -> str:
        """Returns the end of a role's log."""
        return (self.folder / f"{role}.log").read_text(errors="replace")[-4000:]

    @property
    def gateway_address(self) -> str:
        """Where users connect."""
        return self.reach("gateway")

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
