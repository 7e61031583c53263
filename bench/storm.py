"""How many random kills nobody noticed: processes die, freeze and are cut off under the load of three tenants.

Two tenants train on texts, one by its own samples, on two trainers, a sampler, a gateway and a store, all behind
proxies. In spells, each on a new cluster: kill -9, SIGSTOP and reset connections at random moments; then every loss,
sample, step count and content address of the final weights is compared with those of the same loops undisturbed. A
spell that shows a difference, a stuck run or an error leaves its logs in `--folder`.
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.crash.storm import Report, endure
from treadle.errors import TreadleError

Row = dict[str, str]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's options."""
    parser.add_argument("--kills", type=int, default=1000, help="processes to kill")
    parser.add_argument("--spell", type=int, default=50, help="kills between two comparisons")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first spell")
    parser.add_argument("--folder", type=Path, help="where the spells' data and logs are; those in order are removed")


def run(options: argparse.Namespace) -> list[Row]:
    """Rages and returns the report."""
    folder = options.folder or Path(tempfile.mkdtemp(prefix="treadle-storm-"))
    faults: Counter[str] = Counter()
    num_acknowledged = num_compared = num_moved = 0
    wrong: list[str] = []
    stuck: list[str] = []
    began = time.monotonic()
    num_kills = 0
    while num_kills < options.kills:
        place, kills = folder / f"spell-{options.seed + num_kills}", min(options.spell, options.kills - num_kills)
        try:
            report = endure(place, options.seed + num_kills, kills)
        except (AssertionError, TreadleError) as error:
            # The next spell has a cluster of its own.
            report = Report(Counter(), 0, 0, [f"{place.name} did not end: {error}"], 0, [])
        num_kills += kills
        faults += report.faults
        num_acknowledged += report.num_acknowledged
        num_compared += report.num_compared
        num_moved += report.num_moved
        wrong += report.differences
        stuck += report.stuck
        if not report.differences and not report.stuck:
            shutil.rmtree(place)
        minutes = (time.monotonic() - began) / 60
        found = [*report.differences, *report.stuck]
        print(f"{faults['kill']} kills in {minutes:.1f} min, {num_acknowledged} operations: {found}", file=sys.stderr)
    kinds = ", ".join(f"{role} {faults[f'kill {role}']}" for role in ("store", "trainer", "sampler", "gateway"))
    return [
        {"figure": "processes killed", "value": f"{faults['kill']} ({kinds})"},
        {"figure": "frozen, connections reset", "value": f"{faults['freeze']} times, {faults['cut']} times"},
        {"figure": "operations acknowledged meanwhile", "value": f"{num_acknowledged}"},
        {"figure": "runs moved by load meanwhile", "value": f"{num_moved}"},
        {
            "figure": "tenants' steps and final weights that differ from an undisturbed life",
            "value": "; ".join(wrong) or f"0 of {num_compared}",
            "target": "0",
        },
        {"figure": "runs that are stuck or diverged", "value": "; ".join(stuck) or "0", "target": "0"},
        {"figure": "time", "value": f"{(time.monotonic() - began) / 60:.0f} min"},
    ]
