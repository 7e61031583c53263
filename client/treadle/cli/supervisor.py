"""Starts child processes stage by stage, keeps them running, and stops them in reverse order.

A child that ends is started again, later and later; one that keeps failing ends everything. Knows nothing of what
the children are: whether one is ready is asked through a function that is passed in.
"""

import asyncio
import contextlib
import signal
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field

Ready = Callable[[str], Awaitable[bool]]
Say = Callable[[str, str], None]

POLL_SECONDS = 0.1
# What a child gets on top of the grace that it gives its own callers.
KILL_AFTER_SECONDS = 15.0
_LAST_LINES = 15
_LONGEST_LINE_BYTES = 64 * 1024


@dataclass(frozen=True)
class ChildSpec:
    """One process to run."""

    name: str
    command: Sequence[str]
    address: str
    stage: int
    environment: Mapping[str, str] = field(repr=False)  # It holds the internal token.


class RestartPolicy:
    """How long to wait before the next start; pure, the time is passed in."""

    def __init__(self, most_failures: int = 5, window_seconds: float = 60.0) -> None:
        self._most_failures = most_failures
        self._window_seconds = window_seconds
        self._failures: deque[float] = deque()

    def delay_after_failure(self, now: float) -> float | None:
        """Returns the seconds to wait (0.2, 0.4, 0.8, ...), or None when it has failed too often of late."""
        self._failures.append(now)
        while self._failures[0] <= now - self._window_seconds:
            self._failures.popleft()
        count = len(self._failures)
        return None if count >= self._most_failures else 0.1 * 2.0**count


class Child:
    """One supervised process."""

    def __init__(self, spec: ChildSpec, say: Say, on_start: Callable[[], None]) -> None:
        self.spec = spec
        self.process: asyncio.subprocess.Process | None = None
        self.last_lines: deque[str] = deque(maxlen=_LAST_LINES)
        self._say = say
        self._on_start = on_start
        self._stopping = False
        self._policy = RestartPolicy()

    async def keep_running(self) -> None:
        """Runs the process again and again; returns once stopped or when it fails too often."""
        while not self._stopping:
            # A session of its own: Ctrl-C on the terminal reaches the supervisor alone, which knows the order.
            self.process = await asyncio.create_subprocess_exec(
                *self.spec.command,
                env=dict(self.spec.environment),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,
            )
            self._on_start()
            if self._stopping:
                self.signal(signal.SIGTERM)
            lines = asyncio.create_task(self._pass_lines_on(self.process))
            code = await self.process.wait()
            # Its last words are in the pipe; a grandchild that keeps the pipe open must not hold up the restart.
            await asyncio.wait({lines}, timeout=1.0)
            lines.cancel()
            if self._stopping:
                return
            delay = self._policy.delay_after_failure(time.monotonic())
            if delay is None:
                self._say(self.spec.name, f"ended with {_describe(code)} too often; giving up")
                return
            self._say(self.spec.name, f"ended with {_describe(code)}; starting it again in {delay:.1f} s")
            await asyncio.sleep(delay)

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to the process, if it runs."""
        if self.process is not None and self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)

    def stop(self) -> None:
        """Asks the process to drain and not to come back."""
        self._stopping = True
        self.signal(signal.SIGTERM)

    async def _pass_lines_on(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        rest = b""
        while chunk := await process.stdout.read(_LONGEST_LINE_BYTES):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in [*lines, *([rest] if len(rest) > _LONGEST_LINE_BYTES else [])]:
                text = line.decode(errors="replace").rstrip()
                self.last_lines.append(text)
                self._say(self.spec.name, text)
            rest = rest if len(rest) <= _LONGEST_LINE_BYTES else b""
        if rest:
            self._say(self.spec.name, rest.decode(errors="replace"))


class Supervisor:
    """Runs children until told to stop."""

    def __init__(
        self, specs: Sequence[ChildSpec], ready: Ready, say: Say, on_change: Callable[[dict[str, int]], None]
    ) -> None:
        """Takes the children, the readiness check of an address, a line printer, and who hears of new pids."""
        self._ready = ready
        self._say = say
        self._on_change = on_change
        self._children = [Child(spec, say, self._changed) for spec in specs]
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._stop = asyncio.Event()
        self._up = False

    @property
    def pids(self) -> dict[str, int]:
        """Process ids of the running children by name."""
        running = ((child.spec.name, child.process) for child in self._children)
        return {name: process.pid for name, process in running if process is not None and process.returncode is None}

    def request_stop(self) -> None:
        """Ends `run`; a second request kills what has not drained yet."""
        if self._stop.is_set():
            for child in self._children:
                child.signal(signal.SIGKILL)
        self._stop.set()

    async def run(self, on_ready: Callable[[], None]) -> bool:
        """Starts, keeps and drains the children; `on_ready` is called when all are ready.

        Returns True when it was asked to stop, False when a child could not be kept running.
        """
        try:
            for stage in sorted({child.spec.stage for child in self._children}):
                if not await self._start_stage(stage):
                    return self._stop.is_set()
            self._up = True
            self._changed()
            on_ready()
            await self._until(asyncio.Event().wait())
            return self._stop.is_set()
        finally:
            self._up = False
            await self._drain()

    async def _start_stage(self, stage: int) -> bool:
        children = [child for child in self._children if child.spec.stage == stage]
        for child in children:
            self._tasks[child.spec.name] = asyncio.create_task(child.keep_running())
        await self._until(self._all_ready(children))
        return not self._stop.is_set() and not self._given_up()

    async def _all_ready(self, children: Sequence[Child]) -> None:
        for child in children:
            while not await self._ready(child.spec.address):
                await asyncio.sleep(POLL_SECONDS)

    async def _until(self, goal: Coroutine[object, object, object]) -> None:
        """Waits for `goal`, for a request to stop, or for a child that is given up."""
        waits = [asyncio.create_task(goal), asyncio.create_task(self._stop.wait())]
        await asyncio.wait([*waits, *self._tasks.values()], return_when=asyncio.FIRST_COMPLETED)
        for task in waits:
            task.cancel()
        await asyncio.gather(*waits, return_exceptions=True)

    def _given_up(self) -> bool:
        return any(task.done() for task in self._tasks.values())

    async def _drain(self) -> None:
        for stage in sorted({child.spec.stage for child in self._children}, reverse=True):
            tasks = []
            for child in self._children:
                if child.spec.stage == stage and child.spec.name in self._tasks:
                    child.stop()
                    tasks.append(self._tasks[child.spec.name])
            if not tasks:
                continue
            _, late = await asyncio.wait(tasks, timeout=KILL_AFTER_SECONDS)
            for child in self._children:
                if self._tasks.get(child.spec.name) in late:
                    self._say(child.spec.name, f"has not drained within {KILL_AFTER_SECONDS:.0f} s; killing it")
                    child.signal(signal.SIGKILL)
            if late:
                await asyncio.wait(late)

    def _changed(self) -> None:
        if self._up:
            self._on_change(self.pids)


def service_command(module: str, parent_pid: int) -> list[str]:
    """Returns the command that runs a service module as a child of `parent_pid`."""
    return [sys.executable, "-m", "treadle.cli.child", str(parent_pid), module]


def _describe(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return f"signal {signal.Signals(-code).name}"
    return f"signal {-code}"
