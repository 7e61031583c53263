"""What a recipe tells whoever watches it: notices, the plan, a report per step. Knows nothing of terminals or trackers.

A command line draws bars from it, a tracker writes curves, a server forwards it; each is an `Observer`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from treadle.records import TextSample
from treadle.types import OptimStepResponse


@dataclass(frozen=True, slots=True)
class Report:
    """What one optimizer step, or one batch of an evaluation, showed."""

    step: int
    """1 for the first."""
    steps: int
    """How many there will be."""
    metrics: Mapping[str, float]
    """By name, for example `loss`, `reward`, `eval_loss`, `grad_norm`, `learning_rate`."""
    num_tokens: int = 0
    """Positions that went through the base for it."""
    seconds: float = 0.0
    """Time since the report before."""
    samples: Sequence[TextSample] = field(default=())
    """Texts that show what the adapter does now."""


def optim_metrics(answer: OptimStepResponse) -> dict[str, float]:
    """Returns what an optimizer step says of itself that curves are drawn of."""
    return {name: answer.metrics[f"{name}:mean"] for name in ("learning_rate", "grad_norm", "clip_fraction")}


class Observer:
    """Watches a recipe; overrides what it wants to know. Its methods are called from the recipe's thread."""

    def started(self, run: str, plan: Mapping[str, Any], step: int) -> None:
        """The run is there; `plan` is what was chosen for it; `step` steps are done already."""

    def notice(self, text: str) -> None:
        """Something that a person should know, as a sentence."""

    def report(self, report: Report) -> None:
        """A step is done."""

    def should_stop(self) -> bool:
        """Asked at every step: True ends the recipe at a checkpoint that it can be resumed from."""
        return False

    def close(self) -> None:
        """The recipe has ended, well or not."""


class Observers(Observer):
    """Several observers as one."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = observers

    def started(self, run: str, plan: Mapping[str, Any], step: int) -> None:
        """Tells all."""
        for observer in self._observers:
            observer.started(run, plan, step)

    def notice(self, text: str) -> None:
        """Tells all."""
        for observer in self._observers:
            observer.notice(text)

    def report(self, report: Report) -> None:
        """Tells all."""
        for observer in self._observers:
            observer.report(report)

    def should_stop(self) -> bool:
        """Tells whether any wants to stop."""
        return any(observer.should_stop() for observer in self._observers)

    def close(self) -> None:
        """Closes all."""
        for observer in self._observers:
            observer.close()
