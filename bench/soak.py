"""Whether anything grows: memory, open files, threads and slots of every service while tenants come and go.

Three tenants at a time train, publish, sample and save for half a minute, delete all that they made, and are followed
by the next. Fifths of the time are compared: what fills up caches and heaps at first is in the first two.
"""

import argparse
import tempfile
from pathlib import Path

from tests.crash.soak import soak

Row = dict[str, str]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's options."""
    parser.add_argument("--minutes", type=float, default=60.0, help="how long tenants work")


def run(options: argparse.Namespace) -> list[Row]:
    """Soaks and returns the rows."""
    with tempfile.TemporaryDirectory() as folder:
        found = soak(Path(folder) / "cluster", 60 * options.minutes)
    rows = [
        {
            "figure": f"tenants that came and went in {options.minutes:g} min",
            "value": f"{found.num_lives}, {found.num_steps} steps",
        }
    ]
    for name in found.samples:
        fifths = found.fifths(name)
        memory = ", ".join(str(usage.memory >> 20) for usage in fifths)
        files = ", ".join(str(usage.files) for usage in fifths)
        threads = ", ".join(str(usage.threads) for usage in fifths)
        value = f"{memory} MiB; {files}; {threads}"
        figure = f"{name}: anonymous memory, open files, threads, by fifths of the time"
        rows.append({"figure": figure, "value": value, "target": "flat"})
    left = ", ".join(f"{number} {what}" for what, number in found.left.items())
    rows.append({"figure": "held for nobody in the end", "value": left, "target": "0"})
    return rows
