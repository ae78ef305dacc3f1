"""How benchmarks publish: a table between two markers of a Markdown file."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from model.errors import FiftyfoldError
from model.files import write_text

BEGIN, END = "<!-- table -->", "<!-- end of table -->"


def command_line(main: Callable[[], object]) -> None:
    """Run a script's ``main``; a mistake of its user, or sizes beyond the machine's memory, end it with one sentence
    and a non-zero status."""
    try:
        main()
    except FiftyfoldError as error:
        sys.exit(f"error: {error}")
    except RuntimeError as error:
        wanted = re.search(r"you tried to allocate (\d+) bytes", str(error))  # torch has no type of its own for this
        if wanted is None:
            raise
        sys.exit(f"error: these sizes do not fit into memory: {int(wanted[1]) / 2**30:,.0f} GiB were asked for at once")


def count(text: str) -> int:
    """An argparse type: a whole number from 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def verdict(found: float, target: float) -> str:
    """For a column of targets: at least ``target``."""
    return f"{target:g}: {'met' if found >= target else 'missed'}"


def verdict_at_most(found: float, target: float, unit: str = "") -> str:
    return f"at most {target:g}{unit}: {'met' if found <= target else 'missed'}"


def check_page(path: Path) -> tuple[str, str]:
    """What stands before and after the two markers of ``path``. Raises FiftyfoldError unless it has them."""
    if not path.is_file():
        raise FiftyfoldError(f"{path}: there is no such file to put the table into")
    content = path.read_text()
    before, begin, rest = content.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise FiftyfoldError(f"{path}: expected a Markdown file with the lines '{BEGIN}' and '{END}'")
    return before, after


def write_tables(path: Path, text: str) -> None:
    """Put ``text`` between the two markers of ``path``. Raises FiftyfoldError, and writes nothing, without them."""
    before, after = check_page(path)
    write_text(path, f"{before}{BEGIN}\n{text}{END}{after}")
