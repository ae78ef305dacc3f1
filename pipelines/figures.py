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
    """Recall and validation loss against cache bytes per token; rows (bytes, recall, loss, steps).

    Points carry numbers that a list beside them explains: settings with nearly equal caches would overlap as labels.
    """
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    panels = figure.subplots(1, 3, width_ratios=(1, 1, 0.62))
    most = max(steps for *_, steps in trials)
    for axes, place, title, higher in (
        (panels[0], 1, "recall of key-value pairs", True),
        (panels[1], 2, "validation loss", False),
    ):
        points = [(row[0], row[place]) for row in trials]
        line = sorted(points[i] for i in pareto_front(points, higher))
        axes.plot(*zip(*line), color=_LINE, linewidth=1.2, label="Pareto front", zorder=1)
        for i, (x, y) in enumerate(points):
            color = _WINNER if i == winner else _TRIAL
            face = color if trials[i][3] == most else "white"
            axes.scatter(x, y, s=210, edgecolor=color, facecolor=face, zorder=2 + i)
            ink = "white" if face == color else color
            axes.annotate(str(i + 1), (x, y), ha="center", va="center", fontsize=8, color=ink, zorder=2 + i)
        if budget is not None:
            axes.axvline(budget, color=_LINE, linestyle="--", linewidth=1, label=f"budget {budget:g} B")
        axes.set(xlabel="cache bytes per token (measured)", title=title)
        axes.margins(0.15)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8, loc="lower right" if higher else "upper right")
    panels[2].axis("off")
    listed = [
        f"{i + 1}  {label}" + (f"  ({trials[i][3]} steps)" if trials[i][3] < most else "")
        for i, label in enumerate(labels)
    ]
    for i, text in enumerate(listed):
        color = _WINNER if i == winner else "#333333"
        panels[2].text(0, 0.95 - 0.075 * i, text, fontsize=8.5, color=color, transform=panels[2].transAxes)
    panels[2].set_title("trials (winner red, hollow: stopped early)", fontsize=9, loc="left")
    return figure
