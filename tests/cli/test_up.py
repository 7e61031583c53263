"""`treadle up` with the real services on the tiny base, as it is and in 8 bits."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner

from treadle.cli import COMMANDS
from treadle.cli.deployment import ChosenBase, Deployment
from treadle.cli.lazy import LazyGroup

START_SECONDS = 200.0


class Up:
    """A running `treadle up`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ready_file = folder / "ready.json"
        self.log = folder / "up.log"
        command = [sys.executable, "-m", "treadle.cli", "up", "--base", "pip", "--base", "pip@int8", "--port", "0"]
        command += [
            "--threads",
            "1",
            "--data-dir",
            str(folder),
            "--cache-dir",
            str(folder / "cache"),
            "-f",
            "json",
            "--ready-file",
        ]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen([*command, str(self.ready_file)], stdout=log, stderr=log)

    def wait(self, what) -> dict:
        """Returns up.json as soon as `what` holds for it."""
        deadline = time.monotonic() + START_SECONDS
        while True:
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            try:
                state = json.loads((self.folder / "up.json").read_text())
            except (OSError, ValueError):
                state = None
            if state is not None and what(state):
                return state
            time.sleep(0.05)

    def run(self, *arguments: str) -> str:
        """Runs another command against it."""
        done = CliRunner().invoke(LazyGroup(COMMANDS), [*arguments, "--data-dir", str(self.folder)])
        assert done.exit_code == 0, done.output
        return done.stdout


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Up]:
    running = Up(tmp_path)
    yield running
    if running.process.poll() is None:
        running.process.kill()
        running.process.wait()


@pytest.mark.timeout(400)
def test_up_serves_survives_a_kill_and_leaves_nothing(up: Up) -> None:
    """Starts two bases, is used, has a service killed, is told to stop: exit code 0 and no process left."""
    state = up.wait(lambda state: up.ready_file.exists())
    assert set(state["pids"]) == {"store", "trainer", "trainer-1", "sampler", "sampler-1", "gateway"}
    assert (state["base"], state["bases"]) == ("treadle/pip", ["treadle/pip", "treadle/pip@int8"])
    assert os.stat(state["admin_key_file"]).st_mode & 0o077 == 0
    assert up.run("key", "create", "you").startswith("treadle_you_")
    workers = json.loads(up.run("worker", "list", "-f", "json"))
    assert {(worker["worker"], worker["base"]) for worker in workers} == {
        ("sampler-0", "treadle/pip"),
        ("trainer-0", "treadle/pip"),
        ("sampler-1", "treadle/pip@int8"),
        ("trainer-1", "treadle/pip@int8"),
    }
    for base in state["bases"]:
        sampled = json.loads(up.run("sample", base, "Hello", "--max-tokens", "8", "--seed", "1", "-f", "json"))
        assert [row["sample"] for row in sampled] == [0]

    os.kill(state["pids"]["gateway"], signal.SIGKILL)
    again = up.wait(lambda now: now["pids"].get("gateway") not in (None, state["pids"]["gateway"]))
    assert again["gateway"] == state["gateway"]
    assert {name: pid for name, pid in again["pids"].items() if name != "gateway"} == {
        name: pid for name, pid in state["pids"].items() if name != "gateway"
    }

    up.process.send_signal(signal.SIGTERM)
    assert up.process.wait(timeout=60) == 0, up.log.read_text()
    assert not [pid for pid in again["pids"].values() if psutil.pid_exists(pid)]
    assert not (up.folder / "up.json").exists()
    log = up.log.read_text()
    ready = [line["ready"] for line in map(json.loads, log.splitlines()) if "ready" in line]
    assert ready == [json.loads(up.ready_file.read_text())]
    assert "ended with signal SIGKILL" in log
    assert "Traceback" not in log


def test_several_workers_of_several_bases(tmp_path: Path) -> None:
    """Each process has an address, a worker's name and a base of its own."""
    deployment = Deployment(
        bases=(ChosenBase.parse("pip", "nf4"), ChosenBase.parse("/bases/a@b@int8", "none")),
        trainers=2,
        samplers=1,
        data_dir=tmp_path,
        cache_dir=tmp_path,
        host="127.0.0.1",
        allow_plaintext=False,
        port=0,
        threads=1,
        dtype="auto",
        log_level="info",
    )
    children = {child.name: child for child in deployment.children({}, 1)}
    assert len({child.address for child in children.values()} | {deployment.addresses["http"]}) == 9

    def held(name: str) -> tuple[str, str, str]:
        prefix = f"TREADLE_{name.partition('-')[0].upper()}_"
        return tuple(children[name].environment[prefix + key] for key in ("WORKER", "BASE", "QUANTIZE"))

    assert {name: held(name) for name in deployment.workers} == {
        "trainer": ("trainer-0", "pip", "nf4"),
        "trainer-1": ("trainer-1", "pip", "nf4"),
        "trainer-2": ("trainer-2", "/bases/a@b", "int8"),
        "trainer-3": ("trainer-3", "/bases/a@b", "int8"),
        "sampler": ("sampler-0", "pip", "nf4"),
        "sampler-1": ("sampler-1", "/bases/a@b", "int8"),
    }
    assert {child.stage for name, child in children.items() if name in deployment.workers} == {1}


def test_a_base_given_twice_is_refused_before_anything_starts(tmp_path: Path) -> None:
    """More workers of one are another option."""
    line = ["up", "--data-dir", str(tmp_path), "--base", "pip@int8", "--base", "pip", "--quantize", "int8"]
    done = CliRunner().invoke(LazyGroup(COMMANDS), line)
    assert done.exit_code == 1
    assert "treadle/pip@int8 is given twice; --trainers" in done.output


def test_one_data_folder_has_one_up(tmp_path: Path) -> None:
    """The second is refused before it starts anything."""
    import fcntl

    with (tmp_path / "up.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = CliRunner().invoke(LazyGroup(COMMANDS), ["up", "--data-dir", str(tmp_path), "--base", "pip"])
    assert done.exit_code == 1
    assert "runs already over" in done.output


def test_a_base_that_is_not_there_is_refused_before_anything_starts(tmp_path: Path) -> None:
    """With the engine's own sentence."""
    line = ["up", "--data-dir", str(tmp_path), "--base", "./no-such-folder"]
    done = CliRunner().invoke(LazyGroup(COMMANDS), line)
    assert done.exit_code == 1
    assert "no-such-folder does not exist" in done.output


def test_a_taken_port_is_refused_before_anything_starts(tmp_path: Path) -> None:
    """Users wrote it into their programs, so that another would not do."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = ["up", "--data-dir", str(tmp_path), "--base", "pip", "--port", str(port)]
        done = CliRunner().invoke(LazyGroup(COMMANDS), line)
    assert done.exit_code == 1
    assert f"port {port} of 127.0.0.1 is taken" in done.output
