"""Rows of benchmarks kept in the repository: what was run, on what, and what it printed."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Result:
    """One run of a benchmark; `rows` are as its module returned them."""

    name: str
    tag: str
    command: str
    date: str
    machine: str
    rows: list[dict[str, Any]]  # Any: JSON values


def save(name: str, tag: str, options: Sequence[str], rows: list[dict[str, Any]]) -> None:
    """Write the rows of a run to `FOLDER`/NAME-TAG.json."""
    FOLDER.mkdir(exist_ok=True)
    command = " ".join(["python -m bench", name, *options])
    result = Result(name, tag, command, datetime.now(UTC).date().isoformat(), _machine(), rows)
    (FOLDER / f"{name}-{tag}.json").write_text(json.dumps(asdict(result), indent=1) + "\n")


def load_all() -> list[Result]:
    """Return every kept run, by file name."""
    return [Result(**json.loads(path.read_text())) for path in sorted(FOLDER.glob("*.json"))]


def _machine() -> str:
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    vectors = next((name for name in ("amx_tile", "avx512f", "avx2") if name in flags.split()), platform.machine())
    busy = os.getloadavg()[1]
    return f"{os.cpu_count()} cores ({vectors}), load {busy:.1f} over the last 5 minutes, torch {version('torch')}"
