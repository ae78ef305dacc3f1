"""Figures of the benchmarks."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from pipelines.reports.figures import binary

COLORS = ("#7f8c8d", "#2c5f8a", "#c0392b", "#b07d2b", "#4f7f52", "#6c4f8a", "#2f8f8f", "#8a5f4f")
_MIN_LABEL_DISTANCE = 0.04
"""Minimum distance between two labels at the ends of lines, as a share of the axis."""


def _spread(values: Sequence[float], limits: tuple[float, float]) -> list[float]:
    """Return the positions of labels on a logarithmic axis: at the values, and apart where these nearly coincide."""
    distance = _MIN_LABEL_DISTANCE * math.log(limits[1] / limits[0])
    places = [math.log(value) for value in values]
    columns: list[list[int]] = []  # of labels that would overlap, each around their mean

    def center(column: list[int]) -> float:
        return statistics.fmean(math.log(values[label]) for label in column)

    for label in sorted(range(len(values)), key=values.__getitem__):
        column = [label]
        while columns and center(column) - center(columns[-1]) < distance * (len(column) + len(columns[-1])) / 2:
            column = columns.pop() + column
        columns.append(column)
    for column in columns:
        for number, label in enumerate(column):
            places[label] = center(column) + (number - (len(column) - 1) / 2) * distance
    return [math.exp(place) for place in places]


def log_log(lines: Mapping[str, Mapping[int, float]], ylabel: str, title: str) -> Figure:
    """Plot ``lines``, {label: {tokens: value}}, over sequence length on logarithmic axes."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ends: list[tuple[int, float, str]] = []
    lengths = sorted({tokens for line in lines.values() for tokens in line})
    for (label, line), color in zip(lines.items(), itertools.cycle(COLORS)):
        axes.plot(list(line), list(line.values()), "o-", color=color, linewidth=1.8, markersize=4, label=label)
        ends.append((*list(line.items())[-1], color))
    for (tokens, value, color), place in zip(ends, _spread([value for _, value, _ in ends], axes.get_ylim())):
        axes.annotate(f" {value:.3g}", (tokens, place), color=color, va="center", fontsize=9)
    axes.set_xticks(lengths)
    axes.xaxis.set_major_formatter(lambda n, _: binary(n))
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="tokens in the sequence", ylabel=ylabel, title=title)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=9)
    return figure
