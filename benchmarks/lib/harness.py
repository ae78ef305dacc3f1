"""Command line of the benchmarks: common options, a header that describes the machine, and the page of results.

A script calls :func:`run_benchmark` with its options and a measuring function. A page has one section per machine, and
a run replaces the section of its own machine. Requires only torch.
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

from benchmarks.lib.machine import BackgroundLoad, system_info
from benchmarks.lib.report import Page
from model.atomic_files import atomic_file
from model.errors import FiftyfoldError
from model.machine import Machine

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Result:
    """Result of a benchmark: Markdown with headings from ``###``, and an optional figure."""

    tables: str
    figure: Figure | None = None
    caption: str = ""
    has_servers: bool = False
    """True if processes other than this one and its children are measured, too."""
    has_times: bool = True
    """False if no result depends on the load of the machine, which is then not reported."""


def positive_int(text: str) -> int:
    """Parse an integer of at least 1, as an argparse type."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def make_parser(doc: str | None, threads: int | list[int] | None = None) -> argparse.ArgumentParser:
    """Return a parser with the common options.

    ``threads`` is the default of ``--threads``. A list allows several values; None omits the option.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if threads is not None:
        nargs = "+" if isinstance(threads, list) else None
        parser.add_argument("--threads", type=positive_int, nargs=nargs, default=threads, help="default %(default)s")
    parser.add_argument("--write", type=Path, help="Markdown page in which to replace this machine's section")
    return parser


def run_benchmark(
    parser: argparse.ArgumentParser,
    measure: Callable[[argparse.Namespace], Result],
    arguments: list[str] | None = None,
) -> str:
    """Measure, then print and return this machine's section; ``--write`` also stores it and its figure in a page.

    Raises FiftyfoldError.
    """
    options = parser.parse_args(arguments)
    page = Page(options.write) if options.write else None
    before, load = torch.get_num_threads(), BackgroundLoad()
    try:
        result = measure(options)
    finally:
        torch.set_num_threads(before)
    machine = Machine.here(getattr(options, "device", "cpu"))
    threads = getattr(options, "threads", before)
    numbers = " and ".join(map(str, threads)) if isinstance(threads, list) else str(threads)
    plural = "" if numbers == "1" else "s"
    used = [] if result.has_servers else [f"{numbers} thread{plural}"]  # servers choose their own number
    busy = [load.describe(result.has_servers)] if result.has_times else []
    about = f"{'; '.join([system_info(), *used, *busy])}."
    text = f"## {machine.title}\n\n{about}\n\n{result.tables}"
    if page:
        if result.figure:
            path = page.path.with_name(f"{page.path.stem}-{machine.slug}.png")
            with atomic_file(path) as scratch:
                result.figure.savefig(scratch, dpi=130, format="png")
            text += f"\n![{result.caption}]({path.name})\n"
        page.replace_section(machine.title, text)
    print(text)
    return text


def run_main(main: Callable[[], object]) -> None:
    """Run a script's ``main``. User errors and out-of-memory errors exit with one sentence and a non-zero status."""
    try:
        main()
    except FiftyfoldError as error:
        sys.exit(f"error: {error}")
    except RuntimeError as error:
        requested = re.search(r"you tried to allocate (\d+) bytes", str(error))  # torch has no exception type for this
        if requested is None:
            raise
        sys.exit(f"error: out of memory: these sizes need an allocation of {int(requested[1]) / 2**30:,.0f} GiB")
