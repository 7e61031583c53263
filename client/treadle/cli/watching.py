"""What a person at a terminal sees of a recipe: a bar with loss, tokens per second and time left; Ctrl-C that saves.

Knows reports and the terminal; nothing of what is trained.
"""

import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from treadle.recipes.reports import Observer, Report

_LINES = 20
"""Lines of steps that a log gets instead of a bar."""
_SHOWN = frozenset({"loss", "reward", "kl", "accuracy", "eval_loss", "exact_match", "perplexity"})


class TerminalObserver(Observer):
    """Draws a bar, or writes lines where nobody looks at a terminal; quiet when the answer is to be JSON."""

    def __init__(self, console: Console, what: str = "training") -> None:
        self._console = console
        self._stop = False
        self._shown: dict[str, float] = {}
        self._tokens_per_second = 0.0
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(what, total=None, shown="")

    def started(self, run: str, plan: Mapping[str, Any], step: int) -> None:
        """Says which run it is and begins the bar."""
        chosen = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in plan.items() if name != "digest")
        self.notice(f"{'going on at step ' + str(step) + ' of' if step else 'run'} {run}: {chosen}")
        self._progress.start()
        self._progress.update(self._task, total=plan.get("steps"), completed=step)

    def notice(self, text: str) -> None:
        """Prints it above the bar."""
        self._console.print(text, highlight=False, markup=False)

    def report(self, report: Report) -> None:
        """Moves the bar."""
        self._shown |= {name: value for name, value in report.metrics.items() if name in _SHOWN}
        if report.num_tokens:
            rate = report.num_tokens / max(report.seconds, 1e-9)
            # Steps are reported in bursts: a running mean says more than the last one's.
            self._tokens_per_second = 0.9 * self._tokens_per_second + 0.1 * rate if self._tokens_per_second else rate
        shown = "  ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in self._shown.items())
        shown += f"  {self._tokens_per_second:.0f} tok/s"
        self._progress.update(self._task, total=report.steps, completed=report.step, shown=shown)
        if not self._console.is_terminal and report.step % max(1, report.steps // _LINES) == 0 and report.num_tokens:
            self.notice(f"{report.step}/{report.steps}  {shown}")

    def should_stop(self) -> bool:
        """True after Ctrl-C."""
        return self._stop

    def close(self) -> None:
        """Ends the bar."""
        self._progress.stop()

    @contextmanager
    def stops_on_interrupt(self) -> Iterator[None]:
        """Makes the first Ctrl-C a wish to stop at a checkpoint; a second one ends the program as usual."""
        before = signal.getsignal(signal.SIGINT)

        def on_interrupt(_: int, __: FrameType | None) -> None:
            self._stop = True
            signal.signal(signal.SIGINT, before)
            self.notice("stopping at a checkpoint; Ctrl-C again to stop at once")

        signal.signal(signal.SIGINT, on_interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
            self.close()
