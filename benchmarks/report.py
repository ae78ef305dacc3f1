"""How benchmarks publish: a table between two markers of a Markdown file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from model.errors import FiftyfoldError
from model.files import write_text

BEGIN, END = "<!-- table -->", "<!-- end of table -->"


def command_line(main: Callable[[], str]) -> None:
    """Run a script's ``main``; a mistake of its user ends it with one sentence and a non-zero status."""
    try:
        main()
    except FiftyfoldError as error:
        sys.exit(f"error: {error}")


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def verdict(found: float, target: float) -> str:
    """For a column of targets: at least ``target``."""
    return f"{target:g}: {'met' if found >= target else 'missed'}"


def check_page(path: Path) -> tuple[str, str]:
    """What stands before and after the two markers of ``path``. Raises FiftyfoldError unless it has them."""
    content = path.read_text() if path.is_file() else ""
    before, begin, rest = content.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise FiftyfoldError(f"{path}: expected a Markdown file with the lines '{BEGIN}' and '{END}'")
    return before, after


def write_tables(path: Path, text: str) -> None:
    """Put ``text`` between the two markers of ``path``. Raises FiftyfoldError, and writes nothing, without them."""
    before, after = check_page(path)
    write_text(path, f"{before}{BEGIN}\n{text}{END}{after}")
