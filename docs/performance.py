"""Writes docs/performance.md from the benchmark runs kept in bench/results; `render()` is what a test compares with."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.results import Result, load_all  # noqa: E402 - the repository's root is no package path of a plain script

PAGE = ROOT / "docs" / "performance.md"

HEAD = """# Performance

Written by `python docs/performance.py` from the runs kept in `bench/results`
(`python -m bench --save TAG NAME ...` keeps one). Ratios are medians of interleaved rounds in one process unless a row
says otherwise; CPU seconds are the ones to trust, because the machines were shared. No figure here was taken on a GPU.
What a ratio is compared with, and how, is in the module's docstring (`bench/NAME.py`). Missed targets say so.
"""


def render() -> str:
    """Returns the page."""
    return "\n".join([HEAD, *(_section(result) for result in load_all())])


def _section(result: Result) -> str:
    targets = any("target" in row for row in result.rows)
    lines = [f"## {result.name}: {result.tag}", "", f"`{result.command}`, {result.date}, {result.machine}.", ""]
    lines += ["| figure | value | target |", "|---|---|---|"] if targets else ["| figure | value |", "|---|---|"]
    for row in result.rows:
        cells = [row["figure"], row["value"], row.get("target", "")][: 3 if targets else 2]
        lines.append("| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    PAGE.write_text(render())
