"""Curves elsewhere: TensorBoard, Weights & Biases, trackio, or a file of JSON lines. Each package is optional.

A tracker is an observer of a recipe, named `KIND:WHERE` on the command line, for example `tensorboard:logs`.
"""

import contextlib
import importlib
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from treadle.errors import BadInputError
from treadle.recipes.reports import Observer, Report

# The packages are optional and loaded late, so their objects have no type here.
Package = Any


class JsonLinesTracker(Observer):
    """Appends one object per report to a file: `step`, every metric, `samples` if there are any."""

    def __init__(self, where: str) -> None:
        path = Path(where or "metrics.jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")

    def report(self, report: Report) -> None:
        """Appends a line and hands it to the operating system."""
        row: dict[str, Any] = {"step": report.step, **report.metrics}
        if report.samples:
            row["samples"] = [asdict(sample) for sample in report.samples]
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class TensorBoardTracker(Observer):
    """Writes event files into a folder of the run; needs the package tensorboard, and neither torch nor TensorFlow."""

    def __init__(self, where: str) -> None:
        self._folder = Path(where or "logs")
        self._events: Package = _package("tensorboard.summary.writer.event_file_writer", "tensorboard")
        self._summary: Package = _package("tensorboard.compat.proto.summary_pb2", "tensorboard")
        self._event: Package = _package("tensorboard.compat.proto.event_pb2", "tensorboard")
        self._text: Package = _package("tensorboard.plugins.text.metadata", "tensorboard")
        self._tensors: Package = _package("tensorboard.util.tensor_util", "tensorboard")
        self._writer: Package = None

    def started(self, run: str, plan: Mapping[str, Any], step: int) -> None:
        """Opens the run's folder; after a resume, curves go on in it."""
        self._writer = self._events.EventFileWriter(str(self._folder / run.rpartition("/")[2]))

    def report(self, report: Report) -> None:
        """Writes a scalar per metric and a text per sample."""
        values = [self._summary.Summary.Value(tag=tag, simple_value=value) for tag, value in report.metrics.items()]
        for index, sample in enumerate(report.samples):
            tag = f"sample/{index}"
            values.append(
                self._summary.Summary.Value(
                    tag=tag,
                    metadata=self._text.create_summary_metadata(tag, ""),
                    tensor=self._tensors.make_tensor_proto([f"{sample.prompt}\n\n{sample.response}"]),
                )
            )
        summary = self._summary.Summary(value=values)
        self._writer.add_event(self._event.Event(wall_time=time.time(), step=report.step, summary=summary))

    def close(self) -> None:
        """Writes out what waits."""
        if self._writer is not None:
            self._writer.close()


class RunTracker(Observer):
    """Weights & Biases and trackio, which share their three calls: init, log, finish."""

    def __init__(self, package: str, where: str) -> None:
        self._package: Package = _package(package, package)
        self._project = where or "treadle"
        self._run: Package = None

    def started(self, run: str, plan: Mapping[str, Any], step: int) -> None:
        """Begins a run of the tracker's under the run's own name."""
        with contextlib.redirect_stdout(sys.stderr):  # What these packages say is not the program's answer.
            self._run = self._package.init(project=self._project, name=run.rpartition("/")[2], config=dict(plan))

    def report(self, report: Report) -> None:
        """Logs metrics and, as text, samples."""
        texts = {f"sample/{index}": f"{one.prompt}\n{one.response}" for index, one in enumerate(report.samples)}
        # An evaluation has a report of its own at the same step: these packages merge what has the same step.
        self._run.log({**report.metrics, **texts}, step=report.step)

    def close(self) -> None:
        """Ends the run of the tracker's."""
        if self._run is not None:
            with contextlib.redirect_stdout(sys.stderr):
                self._run.finish()


TRACKERS: Final[Mapping[str, Callable[[str], Observer]]] = {
    "jsonl": JsonLinesTracker,
    "tensorboard": TensorBoardTracker,
    "wandb": lambda where: RunTracker("wandb", where),
    "trackio": lambda where: RunTracker("trackio", where),
}


def open_tracker(name: str) -> Observer:
    """Returns the tracker that `KIND` or `KIND:WHERE` names; raises BadInputError."""
    kind, _, where = name.partition(":")
    if kind not in TRACKERS:
        raise BadInputError(f"there is no tracker {kind!r}; there are {', '.join(TRACKERS)}")
    return TRACKERS[kind](where)


def _package(module: str, package: str) -> Package:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise BadInputError(f"this tracker needs the package {package}: pip install {package}") from error
