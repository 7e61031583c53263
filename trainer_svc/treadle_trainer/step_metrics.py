"""Gathers the metrics of one optimizer step of a run: those of its forward_backwards and its own.

They are journaled with the result of the optim_step, so they cost no call and are kept exactly once. After a crash
the replayed operations gather them again. Pure.
"""

from __future__ import annotations

from treadle.internal.v1 import journal_pb2
from treadle.v1 import training_pb2


class StepMetrics:
    """What has been added to the gradient since the last step."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}

    def add(self, result: training_pb2.ForwardBackwardResult, num_tokens: int, device_seconds: float) -> None:
        """Counts a forward_backward in: its sums, its positions and its seconds on the device."""
        found = {name: value for name, value in result.outputs.metrics.items() if name.endswith(":sum")}
        for name, value in (found | {"num_tokens:sum": num_tokens, "device_seconds:sum": device_seconds}).items():
            self._sums[name] = self._sums.get(name, 0.0) + value

    def step(self, result: training_pb2.OptimStepResult) -> journal_pb2.StepMetrics:
        """Returns the metrics of the step that was just made, and begins the next."""
        gathered, self._sums = self._sums, {}
        return journal_pb2.StepMetrics(step=result.step, values={**gathered, **result.metrics})

    def clear(self) -> None:
        """Forgets what was gathered: the gradient was dropped."""
        self._sums = {}
