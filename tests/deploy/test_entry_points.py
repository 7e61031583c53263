"""What the images run, from a fresh environment that is installed as the Dockerfile installs it.

No container engine is here; each step of the Dockerfile that can be taken without one is taken.
"""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.deploy.rendering import ROLES, ROOT
from tests.support.cluster import free_port

DOCKERFILE = (ROOT / "deploy/Dockerfile").read_text()
SERVING = health_pb2.HealthCheckResponse.SERVING


def test_what_is_copied_is_there_and_every_service_has_its_image() -> None:
    """Paths of the build's context, and entry points of this project."""
    for source in re.findall(r"^COPY ((?!--from)\S.*) \S+$", DOCKERFILE, re.MULTILINE):
        for path in source.split():
            assert (ROOT / path).exists(), path
            kept = (ROOT / ".dockerignore").read_text().splitlines()
            assert f"!{path}" in kept
    entries = dict(re.findall(r"^FROM run AS (\w+)\n(?:.*\n)*?ENTRYPOINT \[\"(\S+)\"\]", DOCKERFILE, re.MULTILINE))
    assert entries == {role: f"treadle-{role}" for role in ROLES}


@contextmanager
def _running(command: Path, **settings: str) -> Iterator[grpc.Channel]:
    port = free_port()
    role = command.name.removeprefix("treadle-").upper()
    own = {"LISTEN": "127.0.0.1:0", "INTERNAL_TOKEN": "t", "HEALTH_LISTEN": f"127.0.0.1:{port}", **settings}
    environment = {"PATH": os.environ["PATH"], "HOME": "/tmp", **{f"TREADLE_{role}_{k}": v for k, v in own.items()}}
    with subprocess.Popen([command], env=environment) as process:
        try:
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                yield channel
        finally:
            process.terminate()
            assert process.wait(timeout=60) == 0


def _wait_for(channel: grpc.Channel, service: str, status: int) -> None:
    deadline, stub = time.monotonic() + 120, health_pb2_grpc.HealthStub(channel)
    request = health_pb2.HealthCheckRequest(service=service)
    while True:
        answer = stub.Check(request, timeout=60, wait_for_ready=True)
        if answer.status == status:
            return
        assert time.monotonic() < deadline, f"{service} is {answer.status}"
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("role", ["gateway", "store"])
def test_gateway_and_store_install_and_run_without_torch(role: str, tmp_path: Path) -> None:
    """The extra and the lock file bring all that a service needs, and nothing of the model's side."""
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    install = [venv / "bin/pip", "install", "--quiet", "--constraint", "deploy/requirements.lock", f".[{role}]"]
    subprocess.run(install, cwd=ROOT, check=True)
    listed = subprocess.run([venv / "bin/pip", "list", "--format=freeze"], capture_output=True, text=True, check=True)
    installed = {line.partition("==")[0] for line in listed.stdout.splitlines()}
    assert not {"torch", "transformers", "peft"} & installed
    command = venv / f"bin/treadle-{role}"
    helped = subprocess.run([command, "--help"], capture_output=True, text=True, check=True)
    assert "--health-listen" in helped.stdout
    if role == "store":
        with _running(command, DATA_DIR=str(tmp_path / "data")) as channel:
            _wait_for(channel, "readiness", SERVING)
        return
    # Alive at once, and not ready before the store has told it of the workers.
    with _running(command, STORE_ADDRESS=f"127.0.0.1:{free_port()}", HTTP_LISTEN="") as channel:
        _wait_for(channel, "liveness", SERVING)
        _wait_for(channel, "readiness", health_pb2.HealthCheckResponse.NOT_SERVING)
