"""Publish what a benchmark found: Markdown tables, one section per machine between two markers of a page."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from model.errors import FiftyfoldError
from model.files import write_text

BEGIN, END = "<!-- table -->", "<!-- end of table -->"
_SECTION = re.compile(r"^<!-- machine: (.+) -->\n", re.MULTILINE)


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


class Page:
    """A Markdown file that keeps one section per machine. Raises FiftyfoldError for a file without the markers."""

    def __init__(self, path: Path):
        if not path.is_file():
            raise FiftyfoldError(f"{path}: there is no such file to put the table into")
        self.path = path
        self._parts()

    def _parts(self) -> tuple[str, str, str]:
        """The text before, between and after the two markers."""
        before, begin, rest = self.path.read_text().partition(f"{BEGIN}\n")
        between, end, after = rest.partition(END)
        if not begin or not end:
            raise FiftyfoldError(f"{self.path}: expected a Markdown file with the lines '{BEGIN}' and '{END}'")
        return before, between, after

    def sections(self) -> dict[str, str]:
        """Contents of each machine's section, by the machine's title."""
        _, *found = _SECTION.split(self._parts()[1])
        return dict(zip(found[::2], found[1::2]))

    def put(self, machine: str, text: str) -> None:
        """Replace the machine's section, or add it after those of the others."""
        before, between, after = self._parts()
        opening = _SECTION.split(between)[0]
        sections = {**self.sections(), machine: text.rstrip("\n") + "\n"}
        written = "".join(f"<!-- machine: {title} -->\n{content}" for title, content in sections.items())
        write_text(self.path, f"{before}{BEGIN}\n{opening}{written}{END}{after}")
