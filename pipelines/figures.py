"""Figures of the pipeline steps, drawn with matplotlib's object interface: no window, no global state."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

_WINNER, _TRIAL, _LINE = "#c0392b", "#2c5f8a", "#9aa7b1"


def pareto_front(points: Sequence[tuple[float, float]], higher: bool) -> set[int]:
    """Indices of the points (cost, score) that no other point beats in both; ``higher`` scores are better."""
    sign = 1 if higher else -1
    return {
        i
        for i, (cost, score) in enumerate(points)
        if not any(
            (c <= cost and sign * s >= sign * score) and (c < cost or sign * s > sign * score) for c, s in points
        )
    }


def pareto_figure(
    trials: Sequence[tuple[float, float, float, int]],
    labels: Sequence[str],
    winner: int,
    budget: float | None,
) -> Figure:
    """Recall and validation loss against cache bytes per token; rows (bytes, recall, loss, steps)."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    most = max(steps for *_, steps in trials)
    for panel, (place, title, higher) in enumerate(
        ((1, "recall of key-value pairs", True), (2, "validation loss", False))
    ):
        axes = figure.add_subplot(1, 2, panel + 1)
        rows = [(i, row[0], row[place], row[3]) for i, row in enumerate(trials)]
        front = pareto_front([(x, y) for _, x, y, _ in rows], higher)
        line = sorted((rows[i][1], rows[i][2]) for i in front)
        axes.plot(
            [x for x, _ in line], [y for _, y in line], color=_LINE, linewidth=1.2, label="Pareto front", zorder=1
        )
        for i, x, y, steps in rows:
            axes.scatter(
                x,
                y,
                s=70 if i == winner else 40,
                color=_WINNER if i == winner else _TRIAL,
                facecolor=None if steps == most else "none",
                zorder=2,
            )
        for n, (i, x, y, _) in enumerate(sorted(rows, key=lambda row: (row[1], row[2]))):
            axes.annotate(
                labels[i],
                (x, y),
                xytext=(6, 7 if n % 2 else -11),
                textcoords="offset points",
                fontsize=7,
                color=_WINNER if i == winner else "#444444",
            )
        if budget is not None:
            axes.axvline(budget, color=_LINE, linestyle="--", linewidth=1, label=f"budget {budget:g} B")
        axes.set_xlabel("cache bytes per token (measured)")
        axes.set_title(title, fontsize=11)
        if higher:
            axes.set_ylim(-0.05, 1.08)
        axes.margins(x=0.22)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8, loc="lower right" if higher else "upper right")
    figure.suptitle("Sweep: winner in red, hollow points stopped early", fontsize=10)
    return figure
