"""Children are started in order, kept running, and stopped in reverse order."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from treadle.cli.supervisor import ChildSpec, RestartPolicy, Supervisor

# Writes its name to a log when it starts and when it is told to end; ready when its file is there.
CHILD = """
import pathlib, signal, sys, time
log, ready, name = map(pathlib.Path, sys.argv[1:])
def note(what):
    with log.open("a") as file: file.write(f"{what} {name}\\n")
def end(*_):
    note("end"); sys.exit(0)
signal.signal(signal.SIGTERM, end)
note("start"); ready.touch(); print("hello from", name, flush=True)
while True: time.sleep(0.05)
"""


def child(folder: Path, name: str, stage: int, code: str = CHILD) -> ChildSpec:
    ready = folder / f"{name}.ready"
    command = [sys.executable, "-c", code, str(folder / "log"), str(ready), name]
    return ChildSpec(name, command, str(ready), stage, dict(os.environ))


class Runner:
    """A supervisor over children in `folder`, and what it said."""

    def __init__(self, *specs: ChildSpec) -> None:
        self.lines: list[tuple[str, str]] = []
        self.ready = asyncio.Event()
        self.supervisor = Supervisor(
            specs, self.is_ready, lambda name, line: self.lines.append((name, line)), lambda pids: None
        )
        self.task = asyncio.create_task(self.supervisor.run(self.ready.set))

    @staticmethod
    async def is_ready(address: str) -> bool:
        return Path(address).exists()

    async def said(self, part: str) -> None:
        while not any(part in line for _, line in self.lines):
            await asyncio.sleep(0.01)


def test_restarts_come_later_and_later_and_then_not_at_all() -> None:
    """Five failures within a minute are too many."""
    policy = RestartPolicy()
    assert [policy.delay_after_failure(now) for now in (0.0, 1.0, 2.0, 3.0, 4.0)] == [0.2, 0.4, 0.8, 1.6, None]


def test_old_failures_are_forgiven() -> None:
    """One failure a minute goes on for ever."""
    policy = RestartPolicy()
    assert {policy.delay_after_failure(60.0 * minute) for minute in range(20)} == {0.2}


async def test_stages_start_in_order_and_end_in_reverse(tmp_path: Path) -> None:
    """Nobody starts before those that it needs are ready."""
    run = Runner(child(tmp_path, "front", 2), child(tmp_path, "work", 1), child(tmp_path, "store", 0))
    await run.ready.wait()
    run.supervisor.request_stop()
    assert await run.task
    log = (tmp_path / "log").read_text().split("\n")[:-1]
    assert log == ["start store", "start work", "start front", "end front", "end work", "end store"]
    await run.said("hello from work")


async def test_a_killed_child_is_started_again(tmp_path: Path) -> None:
    """With a new process id and no other child touched."""
    run = Runner(child(tmp_path, "a", 0), child(tmp_path, "b", 0))
    await run.ready.wait()
    before = run.supervisor.pids
    os.kill(before["a"], signal.SIGKILL)
    while (tmp_path / "log").read_text().count("start a") < 2:
        await asyncio.sleep(0.01)
    after = run.supervisor.pids
    assert after["b"] == before["b"]
    assert after["a"] != before["a"]
    assert ("a", "ended with signal SIGKILL; starting it again in 0.2 s") in run.lines
    run.supervisor.request_stop()
    assert await run.task
    assert not run.supervisor.pids


async def test_a_child_that_keeps_failing_ends_everything(tmp_path: Path) -> None:
    """The others are drained, and the caller learns that it was not asked for."""
    broken = child(tmp_path, "broken", 1, code="import sys; print('no such base'); sys.exit(3)")
    run = Runner(child(tmp_path, "store", 0), broken)
    assert await run.task is False
    assert not run.ready.is_set()
    assert ("broken", "no such base") in run.lines
    assert ("broken", "ended with exit code 3 too often; giving up") in run.lines
    assert (tmp_path / "log").read_text() == "start store\nend store\n"


async def test_a_second_request_kills_those_that_do_not_drain(tmp_path: Path) -> None:
    """An impatient Ctrl-C works."""
    deaf = CHILD.replace("signal.signal(signal.SIGTERM, end)", "signal.signal(signal.SIGTERM, signal.SIG_IGN)")
    run = Runner(child(tmp_path, "deaf", 0, code=deaf))
    await run.ready.wait()
    run.supervisor.request_stop()
    await asyncio.sleep(0.1)
    assert not run.task.done()
    run.supervisor.request_stop()
    assert await run.task


async def test_long_and_broken_lines_are_passed_on(tmp_path: Path) -> None:
    """A child's output cannot block or break the supervisor."""
    noisy = CHILD.replace(
        'print("hello from"', 'sys.stdout.buffer.write(b"x" * 300_000 + b"\\xff\\n"); print("hello from"'
    )
    run = Runner(child(tmp_path, "noisy", 0, code=noisy))
    await run.said("hello from noisy")
    assert sum(line.count("x") for _, line in run.lines) == 300_000
    run.supervisor.request_stop()
    await run.task


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's death")
def test_children_end_when_their_supervisor_is_killed(tmp_path: Path) -> None:
    """Nothing is left behind, and the child may still drain."""
    (tmp_path / "sleeper.py").write_text(
        "import pathlib, signal, sys, time\n"
        "def end(*_): pathlib.Path('ended').touch(); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, end); pathlib.Path('started').touch()\n"
        "while True: time.sleep(0.05)\n"
    )
    parent = (
        "import os, subprocess, sys, time\n"
        "subprocess.Popen([sys.executable, '-m', 'treadle.cli.child', str(os.getpid()), 'sleeper'])\n"
        "time.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", parent], cwd=tmp_path, env=environment)
    wait_for(tmp_path / "started")
    process.kill()
    process.wait()
    wait_for(tmp_path / "ended")


def wait_for(path: Path) -> None:
    import time

    while not path.exists():
        time.sleep(0.01)
