"""Tables that are printed, stored with results, and shown in HTML."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.reports.terminal import print_table


@dataclass(frozen=True)
class Table:
    """A titled table of text, and a note below it."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""

    def show(self) -> None:
        """Print the table."""
        print_table(self.title, self.columns, self.rows)
        if self.note:
            print(f"  {self.note}\n", flush=True)
