"""`python -m bench NAME [options]`: runs one benchmark; prints a table, or JSON with --json.

With --save the rows are kept in bench/results, from which `python docs/performance.py` writes docs/performance.md.
"""

import argparse
import importlib
import json

from rich.console import Console
from rich.table import Table

from bench import results

NAMES = (
    "agreement",
    "capacity",
    "dashboard",
    "effort",
    "fairness",
    "fanout",
    "foundation",
    "http",
    "lora",
    "memory",
    "move",
    "openai_face",
    "ranks",
    "recovery",
    "rl",
    "sampling",
    "service",
    "soak",
    "store",
    "storm",
    "training",
    "weights",
)


def main() -> None:
    """Runs the benchmark that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--save", metavar="TAG", help="keep the rows as bench/results/NAME-TAG.json")
    known, rest = parser.parse_known_args()
    module = importlib.import_module(f"bench.{known.name}")
    options = argparse.ArgumentParser(prog=f"python -m bench {known.name}")
    module.add_options(options)
    rows = module.run(options.parse_args(rest))
    if known.save:
        results.save(known.name, known.save, rest, rows)
    if known.json:
        print(json.dumps(rows, indent=2))
        return
    columns = ["figure", "value"] + ["target"] * any("target" in row for row in rows)
    table = Table(*columns, title=f"bench {known.name}")
    for row in rows:
        table.add_row(*(row.get(column, "") for column in columns))
    Console().print(table)


if __name__ == "__main__":
    main()
