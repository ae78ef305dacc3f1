"""What a person sees while a model trains: one live line on a terminal, a line per report elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

console = Console()


class TrainingProgress:
    """Context manager; feed it the metrics of :class:`pipelines.training.trainer.Reporter`."""

    def __init__(self, name: str, total_steps: int, quiet: bool = False):
        self.name, self.total, self.quiet = name, total_steps, quiet
        self._shown: dict[str, float] = {}
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._started: tuple[float, int] | None = None
        if console.is_terminal and not quiet:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._bar.add_task(name, total=total_steps, numbers="starting workers")

    def __enter__(self) -> TrainingProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, metrics: dict[str, float], reported: bool) -> None:
        """``reported`` marks a validation or checkpoint, which gets a line of its own where lines are printed."""
        self._shown.update(metrics)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, numbers=self._numbers())
        elif reported and not self.quiet:
            print(f"{self.name}: step {step}/{self.total} {self._numbers()} {self._time_left(step)}", flush=True)

    def tell(self, step: int, what: str) -> None:
        """A line that stays."""
        if not self.quiet:
            print(f"{self.name}: step {step}: {what}", flush=True)

    def _numbers(self) -> str:
        shown = self._shown
        parts = []
        for label, key, form in (
            ("loss", "train/loss", ".3f"),
            ("recall", "validation/recall", ".1%"),
            ("tokens/s", "train/tokens_per_second", ",.0f"),
        ):
            value = shown.get(key)
            if value is not None and value == value:
                parts.append(f"{label} {value:{form}}")
        return "  ".join(parts)

    def _time_left(self, step: int) -> str:
        now = time.monotonic()
        if self._started is None:
            self._started = (now, step)
            return ""
        since, first = self._started
        return f" {(now - since) / max(1, step - first) * (self.total - step):.0f}s left"


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A table as wide as it needs, also where the output is a file."""
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    wide = console if console.is_terminal else Console(width=160, file=sys.stdout)
    wide.print(table)
