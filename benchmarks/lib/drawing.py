"""Figures of the benchmarks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from pipelines.reports.figures import binary

COLORS = ("#7f8c8d", "#2c5f8a", "#c0392b", "#b07d2b", "#4f7f52", "#6c4f8a", "#2f8f8f", "#8a5f4f")
_MIN_LABEL_DISTANCE = 0.12
"""Labels whose logarithms are closer would overlap."""


def log_log(lines: Mapping[str, Mapping[int, float]], ylabel: str, title: str) -> Figure:
    """Plot ``lines``, {label: {tokens: value}}, over sequence length on logarithmic axes."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    labeled: list[float] = []
    lengths = sorted({tokens for line in lines.values() for tokens in line})
    for (label, line), color in zip(lines.items(), itertools.cycle(COLORS)):
        axes.plot(list(line), list(line.values()), "o-", color=color, linewidth=1.8, markersize=4, label=label)
        tokens, value = list(line.items())[-1]
        if all(abs(math.log(value / other)) > _MIN_LABEL_DISTANCE for other in labeled):
            axes.annotate(f" {value:.3g}", (tokens, value), color=color, va="center", fontsize=9)
            labeled.append(value)
    axes.set_xticks(lengths)
    axes.xaxis.set_major_formatter(lambda n, _: binary(n))
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="tokens in the sequence", ylabel=ylabel, title=title)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=9)
    return figure
