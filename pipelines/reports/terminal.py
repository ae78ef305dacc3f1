"""Terminal output: training progress and tables. Text is printed as it is: ``[b]`` in a path or a name is no markup."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from pipelines.recipe.metrics import LOSS, RECALL


def _console(**options: Any) -> Console:
    return Console(markup=False, emoji=False, **options)


console = _console()


class TrainingProgress:
    """Context manager that shows a live progress bar on a terminal, and prints a line per report elsewhere."""

    def __init__(self, name: str, total_steps: int, quiet: bool = False):
        self.name, self.total, self.quiet = name, total_steps, quiet
        self._metrics: dict[str, float] = {}
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._started: tuple[float, int] | None = None
        if console.is_terminal and not quiet:
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[metrics]}", markup=False),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._bar.add_task(name, total=total_steps, metrics="starting workers")

    def __enter__(self) -> TrainingProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, metrics: dict[str, float], reported: bool) -> None:
        """Show metrics. ``reported`` marks a validation or checkpoint, for which a line is printed."""
        self._metrics.update(metrics)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, metrics=self._format_metrics())
        elif reported and not self.quiet:
            if LOSS not in metrics:  # a checkpoint between validations
                self._metrics = {key: value for key, value in self._metrics.items() if key not in (LOSS, RECALL)}
            line = f"{self.name}: step {step}/{self.total} {self._format_metrics()} {self._format_time_left(step)}"
            print(line.rstrip(), flush=True)

    def print_event(self, step: int, message: str) -> None:
        """Print a line that stays."""
        if not self.quiet:
            print(f"{self.name}: step {step}: {message}", flush=True)

    def _format_metrics(self) -> str:
        parts = []
        for label, key, spec in (
            ("loss", "train/loss", ".3f"),
            ("validation loss", LOSS, ".3f"),
            ("recall", RECALL, ".1%"),
            ("tokens/s", "train/tokens_per_second", ",.0f"),
        ):
            value = self._metrics.get(key)
            if value is not None and value == value:
                parts.append(f"{label} {value:{spec}}")
        return "  ".join(parts)

    def _format_time_left(self, step: int) -> str:
        now = time.monotonic()
        if self._started is None:
            self._started = (now, step)
            return ""
        since, first = self._started
        return f" {(now - since) / max(1, step - first) * (self.total - step):.0f}s left"


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a title and a table at their natural widths, also where the output is a file."""
    table = Table()
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    wide = console if console.is_terminal else _console(width=160, file=sys.stdout)
    wide.print(Text(title, style="italic"))  # a title of the table itself would be wrapped to the table's width
    wide.print(table)
