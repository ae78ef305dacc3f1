"""Image files of figures, and sequence lengths on their axes."""

from __future__ import annotations

import io
import math
from pathlib import Path

from matplotlib.figure import Figure

from model.atomic_files import atomic_file

LENGTHS = tuple(1 << power for power in range(10, 21, 2))
"""Sequence lengths of tables: 1K to 1M."""
FIGURE_SUFFIXES = (".png", ".svg", ".pdf")
_DPI = 130


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure to a file with one of FIGURE_SUFFIXES, atomically."""
    with atomic_file(path) as scratch:
        figure.savefig(scratch, dpi=_DPI, format=path.suffix[1:])


def png_bytes(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, dpi=_DPI, format="png")
    return stream.getvalue()


def curve_lengths(first: int, last: int, per_doubling: int) -> list[int]:
    """Return sequence lengths from ``first`` to ``last``, a power of two times it, with equal ratios."""
    points = int(math.log2(last // first)) * per_doubling
    return [round(first * 2 ** (i / per_doubling)) for i in range(points + 1)]


def binary(tokens: float) -> str:
    """Format a token count in powers of 1,024: 4K, 1M, 31.8K."""
    for unit, scale in (("M", 1 << 20), ("K", 1 << 10)):
        if tokens >= scale:
            return f"{tokens / scale:.1f}".removesuffix(".0") + unit
    return f"{tokens:.0f}"
