"""One managed job as a process beside the gateway: runs the recipe through the public API with its owner's key.

Reads its task as JSON from stdin, so that the key is in no command line and no environment; writes what happens as
JSON lines to stdout; stops at a checkpoint on SIGTERM, and when the gateway that started it is gone. Knows nothing of
browsers.
"""

import json
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from treadle.client import ServiceClient
from treadle.errors import TreadleError
from treadle.recipes.configs import SftConfig
from treadle.recipes.job import StoppedError
from treadle.recipes.reports import Observer, Report
from treadle.recipes.rows import DataError
from treadle.recipes.sft import sft
from treadle.settings import client_settings


class PipeObserver(Observer):
    """Writes each event as a line."""

    def __init__(self) -> None:
        self._stopping = False
        self._parent = os.getppid()
        signal.signal(signal.SIGTERM, self._stop)

    def started(self, run: str, plan: Mapping[str, Any], step: int) -> None:
        """Tells the run's name."""
        tell(event="started", run=run, steps=plan.get("steps", 0), step=step)

    def notice(self, text: str) -> None:
        """Passes the sentence on."""
        tell(event="notice", text=text)

    def report(self, report: Report) -> None:
        """Tells how far it is; the curves go to the service."""
        tell(event="step", step=report.step, steps=report.steps)

    def should_stop(self) -> bool:
        """Tells whether it was asked to stop, or its gateway has died."""
        return self._stopping or os.getppid() != self._parent

    def _stop(self, *_: object) -> None:
        self._stopping = True


def tell(**event: object) -> None:
    """Writes an event; a reader that is gone is no reason to fail."""
    try:
        print(json.dumps(event), flush=True)
    except BrokenPipeError:
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115  As long as the process.


def main() -> None:
    """Runs the task on stdin to its end."""
    task = json.load(sys.stdin)
    observer = PipeObserver()
    settings = client_settings(task["address"], task["key"])
    try:
        config = SftConfig(**task["config"])
        with ServiceClient(settings=settings) as service:
            result = sft(service, config, observer)
        tell(event="finished", run=result.run, revision=result.revision)
    except StoppedError as stopped:
        tell(event="stopped", run=stopped.run, step=stopped.step)
    except (TreadleError, DataError, ValueError, OSError) as error:
        # A DataError names the file by its path here; its owner knows it by its name.
        tell(event="failed", text=str(error).replace(task["config"]["data"], Path(task["config"]["data"]).name))


if __name__ == "__main__":
    main()
