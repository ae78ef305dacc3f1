"""Markdown tables, and pages with one section per machine between two markers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from model.atomic_files import write_text
from model.errors import FiftyfoldError

BEGIN, END = "<!-- table -->", "<!-- end of table -->"
_SECTION = re.compile(r"^<!-- machine: (.+) -->\n", re.MULTILINE)


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Format a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


class Page:
    """Markdown file with one section per machine. Raises FiftyfoldError for a file without the markers."""

    def __init__(self, path: Path):
        if not path.is_file():
            raise FiftyfoldError(f"{path}: no such file")
        self.path = path
        self._split()

    def _split(self) -> tuple[str, str, str]:
        """Return the text before, between, and after the markers."""
        before, begin, rest = self.path.read_text().partition(f"{BEGIN}\n")
        between, end, after = rest.partition(END)
        if not begin or not end:
            raise FiftyfoldError(f"{self.path}: expected a Markdown file with the lines '{BEGIN}' and '{END}'")
        return before, between, after

    def sections(self) -> dict[str, str]:
        """Return each machine's section by title."""
        _, *fields = _SECTION.split(self._split()[1])
        return dict(zip(fields[::2], fields[1::2]))

    def replace_section(self, machine: str, text: str) -> None:
        """Replace the machine's section, or append it."""
        before, between, after = self._split()
        preamble = _SECTION.split(between)[0]
        sections = {**self.sections(), machine: text.rstrip("\n") + "\n"}
        body = "".join(f"<!-- machine: {title} -->\n{content}" for title, content in sections.items())
        write_text(self.path, f"{before}{BEGIN}\n{preamble}{body}{END}{after}")
