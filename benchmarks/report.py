"""How benchmarks publish: a table between two markers of a Markdown file, and a figure beside it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from model.errors import FiftyfoldError
from model.files import write_text
from pipelines.figures import binary

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


def log_log(path: Path, lines: Mapping[str, Mapping[int, float]], ylabel: str, title: str) -> None:
    """Draw ``lines``, {label: {tokens: value}}, over the sequence's length."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    lengths = sorted({tokens for line in lines.values() for tokens in line})
    for (label, line), color in zip(lines.items(), ("#7f8c8d", "#2c5f8a", "#c0392b", "#b07d2b", "#4f7f52", "#6c4f8a")):
        axes.plot(list(line), list(line.values()), "o-", color=color, linewidth=1.8, markersize=4, label=label)
        last = list(line.items())[-1]
        axes.annotate(f" {last[1]:.3g}", last, color=color, va="center", fontsize=9)
    axes.set_xticks(lengths)
    axes.xaxis.set_major_formatter(lambda n, _: binary(n))
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="tokens in the sequence", ylabel=ylabel, title=title)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=9)
    figure.savefig(path, dpi=130)
