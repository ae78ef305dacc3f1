"""The Pareto front of a sweep: its table, figure and verdict, from its results alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from matplotlib.figure import Figure

from pipelines.reports.cache_measurement import BYTES_PER_TOKEN
from pipelines.reports.tables import Table

_CHOSEN, _FRONT, _DOMINATED, _LINE = "#c0392b", "#2c5f8a", "#b0b8be", "#9aa7b1"
_PANELS = (
    ("validation/recall", "recall of key-value pairs", True),
    ("validation/loss", "validation loss of text and answers (nats per token)", False),
)


@dataclass(frozen=True)
class Point:
    """A trial."""

    label: str
    settings: dict[str, Any]
    metrics: dict[str, float]
    run_id: str
    steps: int

    @property
    def cost(self) -> float:
        return self.metrics[BYTES_PER_TOKEN]


@dataclass(frozen=True)
class SweepReport:
    """Results of a sweep. Points are ordered by their cache."""

    name: str
    command: str
    seed: int
    metric: str
    mode: str
    length: int
    """Tokens of the rows on which the metric was measured."""
    budget: float | None
    points: list[Point]
    chosen: int
    skipped: dict[str, str]
    """Invalid points and why."""
    by_length: dict[str, dict[str, float]] = field(default_factory=dict)
    """Scores by "<task> at <length> tokens", then by the run of a point on the front."""

    @property
    def higher(self) -> bool:
        """True if a higher metric is better."""
        return self.mode == "max"

    @property
    def scores(self) -> list[tuple[float, float]]:
        return [(point.cost, point.metrics[self.metric]) for point in self.points]

    @property
    def front(self) -> set[int]:
        return pareto_front(self.scores, self.higher)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SweepReport:
        """Build from plain values, as read from JSON."""
        return cls(**{**values, "points": [Point(**point) for point in values["points"]]})


def pareto_front(points: Sequence[tuple[float, float]], higher: bool) -> set[int]:
    """Return the indices of the points (cost, score) on the Pareto front. A score that is not finite is on none.

    Args:
        higher: Whether higher scores are better.
    """
    sign = 1 if higher else -1
    return {
        i
        for i, (cost, score) in enumerate(points)
        if math.isfinite(score)
        and not any(
            (c <= cost and sign * s >= sign * score) and (c < cost or sign * s > sign * score) for c, s in points
        )
    }


def hypervolume(points: Sequence[tuple[float, float]], higher: bool) -> float:
    """Return the share of a rectangle of (cost, score) that the points dominate, from 0 to 1.

    The rectangle spans from the lowest to the highest cost, and from the worst to the best score of the points. It is 1
    if one point has the lowest cost and the best score, as where all costs or all scores are equal.
    """
    sign = 1 if higher else -1
    finite = [(cost, sign * score) for cost, score in points if math.isfinite(score)]
    if not finite:
        return 0.0
    costs, scores = zip(*finite)
    width, height = max(costs) - min(costs), max(scores) - min(scores)
    if not width or not height:
        return 1.0
    area, covered = 0.0, min(scores)
    ordered = sorted(finite, key=lambda point: point[1])
    for _, score in ordered:
        if score > covered:
            # The cheapest point that reaches this score covers the strip below it.
            cheapest = min(cost for cost, other in finite if other >= score)
            area += (score - covered) * (max(costs) - cheapest)
            covered = score
    return area / (width * height)


def table(report: SweepReport) -> Table:
    """Return the trials by cache size, each with its run."""
    names = [BYTES_PER_TOKEN, *dict.fromkeys((report.metric, "validation/recall", "validation/loss"))]
    front = report.front
    rows = []
    for i, point in enumerate(report.points):
        place = "chosen" if i == report.chosen else "front" if i in front else "dominated"
        values = (f"{point.metrics.get(name, float('nan')):.3f}" for name in names)
        rows.append([point.label, *values, str(point.steps), place, point.run_id[:8]])
    note = f"hypervolume {hypervolume(report.scores, report.higher):.3f} of the rectangle that the trials span"
    if report.skipped:
        note += f"; {len(report.skipped)} invalid points skipped"
    return Table(f"{report.name}: trials", ["settings", *names, "steps", "", "run"], rows, note)


def verdict(report: SweepReport) -> list[str]:
    """Return sentences on the cost of each setting, over trials that ran to the end, and on the front."""
    longest = max(point.steps for point in report.points)
    whole = [
        point
        for point in report.points
        if point.steps == longest and point.metrics[report.metric] == point.metrics[report.metric]
    ]
    where = f"at {report.length} tokens"
    found = [f"{len(whole)} of {len(report.points)} trials ran to the end ({longest} steps); only these are compared."]
    for key in report.points[0].settings:
        found += _effect(key, whole, report.metric, where)
    front = [report.points[i] for i in sorted(report.front)]
    if len(front) > 1:
        small, large = front[0], front[-1]
        found.append(
            f"Along the front the cache falls from {large.cost:.1f} to {small.cost:.1f} bytes per token "
            f"(÷ {large.cost / small.cost:.2f}), and {report.metric} goes from {large.metrics[report.metric]:.3f} to "
            f"{small.metrics[report.metric]:.3f} {where}."
        )
    elif front:
        found.append(f"One point is better than all others: {front[0].label}, run {front[0].run_id}.")
    for setting, scores in report.by_length.items():
        listed = [
            f"{scores[point.run_id]:.3f} with {point.cost:.1f} bytes per token ({point.label})"
            for point in reversed(front)
            if point.run_id in scores
        ]
        found.append(f"{setting}: {', '.join(listed)}.")
    chosen = report.points[report.chosen]
    found.append(f"Chosen: {chosen.label}, {chosen.cost:.1f} bytes per token, run {chosen.run_id}.")
    return found


def _effect(key: str, points: Sequence[Point], metric: str, where: str) -> list[str]:
    """Return a sentence on the lowest and highest value of a numeric key, or on each half of many values."""
    values = [point.settings[key] for point in points]
    if not values or any(isinstance(value, bool | str | list) for value in values) or len(set(values)) < 2:
        return []
    distinct = sorted(set(values))
    few = len(distinct) <= len(points) // 2
    middle = statistics.median(values)
    low = [p for p in points if (p.settings[key] == distinct[0] if few else p.settings[key] < middle)]
    high = [p for p in points if (p.settings[key] == distinct[-1] if few else p.settings[key] >= middle)]
    if not low or not high:
        return []
    names = (f"{distinct[0]:g}", f"{distinct[-1]:g}") if few else (f"below {middle:.3g}", f"from {middle:.3g}")
    sizes, scores = (
        [statistics.fmean(point.metrics[name] for point in side) for side in (low, high)]
        for name in (BYTES_PER_TOKEN, metric)
    )
    return [
        f"{key} {names[0]} → {names[1]}: cache {sizes[0]:.1f} → {sizes[1]:.1f} bytes per token, {metric} "
        f"{scores[0]:.3f} → {scores[1]:.3f} {where} (means over {len(low)} and {len(high)} trials)."
    ]


def figure(report: SweepReport) -> Figure:
    """Draw recall and validation loss against cache bytes per token, with the front of each.

    Points are numbered and listed below the panels, since labels of nearly equal caches would overlap.
    """
    below = 0.24 * (len(report.points) + 1)
    drawn = Figure(figsize=(12, 4.6 + below), layout="constrained")
    grid = drawn.add_gridspec(2, 2, height_ratios=(4.6, below))
    panels = [drawn.add_subplot(grid[0, 0]), drawn.add_subplot(grid[0, 1]), drawn.add_subplot(grid[1, :])]
    most = max(point.steps for point in report.points)
    for axes, (name, title, higher) in zip(panels, _PANELS):
        scores = [(point.cost, point.metrics.get(name, float("nan"))) for point in report.points]
        front = pareto_front(scores, higher)
        axes.plot(*zip(*sorted(scores[i] for i in front)), color=_LINE, linewidth=1.2, label="Pareto front", zorder=1)
        for i, (cost, score) in enumerate(scores):
            color = _CHOSEN if i == report.chosen else _FRONT if i in front else _DOMINATED
            face = color if report.points[i].steps == most else "white"
            axes.scatter(cost, score, s=210, edgecolor=color, facecolor=face, zorder=2 + i)
            ink = "white" if face == color else color
            axes.annotate(str(i + 1), (cost, score), ha="center", va="center", fontsize=8, color=ink, zorder=2 + i)
        if report.budget is not None:
            label = f"budget {report.budget:g} B"
            axes.axvline(report.budget, color=_LINE, linestyle="--", linewidth=1, label=label)
        axes.set(xlabel="cache bytes per token (measured)", title=title)
        axes.margins(0.15)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8, loc="lower right" if higher else "upper right")
    panels[2].axis("off")
    for i, point in enumerate(report.points):
        stopped = f"  ({point.steps} steps)" if point.steps < most else ""
        color = _CHOSEN if i == report.chosen else "#333333"
        text = f"{i + 1}  {point.label}{stopped}  {point.run_id[:8]}"
        place = 1 - (i + 1) / (len(report.points) + 1)
        panels[2].text(0, place, text, fontsize=9, color=color, transform=panels[2].transAxes)
    panels[2].set_title(
        "trials with runs (red: chosen, gray: dominated, hollow: stopped early)", fontsize=9, loc="left"
    )
    return drawn
