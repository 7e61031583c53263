"""A recipe as a part of a program: settings, an observer, a result.

Prints:
    run tenants/...
    step 8: loss ...
    published tenants/.../revisions/final
"""

import json
from collections.abc import Mapping
from pathlib import Path

import treadle
from treadle.recipes.configs import SftConfig
from treadle.recipes.reports import Observer, Report
from treadle.recipes.sft import sft


class Print(Observer):
    """Prints what it hears of."""

    def started(self, run: str, plan: Mapping[str, object], step: int) -> None:
        print("run", run)

    def report(self, report: Report) -> None:
        if report.step == report.steps:
            print(f"step {report.step}: loss {report.metrics['loss']:.3f}")


rows = [{"prompt": f"What is {n} plus 1?", "response": f"{n} plus 1 is {n + 1}."} for n in range(8)]
Path("sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
with treadle.ServiceClient() as service:
    result = sft(service, SftConfig(data="sums.jsonl", steps=8, batch_size=4, eval_fraction=0), Print())
    print("published", result.revision)
