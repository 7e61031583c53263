"""Service processes that start in tenths of a second: forked from one that has imported everything.

Importing torch takes a trainer most of its start; what a test of restarts wants to see is the rest. The children are
real processes that run the services' own main functions, with their own environment and log, and can be killed and
stopped like any other. Only the fork server, which runs nothing itself, is shared.
"""

import importlib
import multiprocessing
import os
import sys
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

PRELOADED = [
    "treadle_store.__main__",
    "treadle_gateway.__main__",
    "treadle_sampler.__main__",
    "treadle_trainer.__main__",
    # A trainer imports it in the background of its first seconds.
    "peft",
]


def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _serve(role: str, environment: dict[str, str], log: str) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [f"treadle-{role}"]
    importlib.import_module(f"treadle_{role}.__main__").main()


class ForkedProcess:
    """A service as a child of the fork server, with the few methods of Popen that tests use."""

    def __init__(self, role: str, environment: dict[str, str], log: Path) -> None:
        self._process: ForkServerProcess = _context().Process(target=_serve, args=(role, environment, str(log)))
        self._process.daemon = True
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        """Returns the exit code, None while it runs."""
        return self._process.exitcode

    def kill(self) -> None:
        """Ends it as a crash would."""
        self._process.kill()

    def send_signal(self, number: int) -> None:
        """Sends a signal if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def wait(self, timeout: float | None = None) -> int:
        """Waits for its end and returns the exit code; TimeoutError."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise TimeoutError(f"process {self.pid} still runs after {timeout} s")
        return self._process.exitcode
