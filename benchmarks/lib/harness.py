"""Run a benchmark: options that all have, the header that names the machine, and the page that keeps the tables.

A script calls :func:`benchmark` with its own options and a function that measures. Everything printed or written goes
through here, so every page has the same shape: one section per machine, and a run replaces its own machine's only.
Needs nothing but torch.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.lib.machine import Machine, OtherLoad, surroundings
from benchmarks.lib.report import Page
from model.errors import FiftyfoldError
from model.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Findings:
    """Result of a benchmark: Markdown whose headings begin at ``###``, and a figure for the page."""

    tables: str
    figure: Figure | None = None
    caption: str = ""


def count(text: str) -> int:
    """An argparse type: a whole number from 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def options_of(doc: str | None, threads: int | list[int] | None = None) -> argparse.ArgumentParser:
    """Make a parser with the options that all benchmarks share; ``threads`` is the default of ``--threads``, which
    takes several numbers where that is a list and does not exist without it."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if threads is not None:
        nargs = "+" if isinstance(threads, list) else None
        parser.add_argument("--threads", type=count, nargs=nargs, default=threads, help="default %(default)s")
    parser.add_argument("--write", type=Path, help="a Markdown page; the section of this machine in it is replaced")
    return parser


def benchmark(
    parser: argparse.ArgumentParser,
    measure: Callable[[argparse.Namespace], Findings],
    arguments: list[str] | None = None,
) -> str:
    """Measure, print the section of this machine and, with ``--write``, put it and its figure beside the others.
    Return the section. Raises FiftyfoldError."""
    options = parser.parse_args(arguments)
    page = Page(options.write) if options.write else None
    before, load = torch.get_num_threads(), OtherLoad()
    try:
        findings = measure(options)
    finally:
        torch.set_num_threads(before)
    machine = Machine.here(getattr(options, "device", "cpu"))
    threads = getattr(options, "threads", before)
    numbers = " and ".join(map(str, threads)) if isinstance(threads, list) else str(threads)
    plural = "" if numbers == "1" else "s"
    text = f"## {machine.title}\n\n{surroundings()}; {numbers} thread{plural}; {load}.\n\n{findings.tables}"
    if page:
        if findings.figure:
            path = page.path.with_name(f"{page.path.stem}-{machine.slug}.png")
            with atomic_file(path) as scratch:
                findings.figure.savefig(scratch, dpi=130, format="png")
            text += f"\n![{findings.caption}]({path.name})\n"
        page.put(machine.title, text)
    print(text)
    return text


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
