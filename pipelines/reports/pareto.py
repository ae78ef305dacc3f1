"""The Pareto front of a sweep: its table, figure and verdict, from its results alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from matplotlib.figure import Figure

from model.wording import count
from pipelines.recipe.metrics import LOSS, RECALL
from pipelines.reports.cache_measurement import BYTES_PER_TOKEN
from pipelines.reports.tables import Table

_CHOSEN, _FRONT, _DOMINATED, _LINE = "#c0392b", "#2c5f8a", "#b0b8be", "#9aa7b1"
_PANELS = (
    (RECALL, "recall of key-value pairs", True),
    (LOSS, "validation loss of text and answers (nats per token)", False),
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
    def finished(self) -> list[int]:
        """Indices of the points that were trained for as many steps as any. Only these are compared."""
        most = max(point.steps for point in self.points)
        return [i for i, point in enumerate(self.points) if point.steps == most]

    @property
    def front(self) -> set[int]:
        return self.front_of(self.metric, self.higher)

    @property
    def hypervolume(self) -> float:
        return hypervolume([self._score(i, self.metric) for i in self.finished], self.higher)

    def front_of(self, metric: str, higher: bool) -> set[int]:
        """Return the indices of the finished points on the Pareto front of a metric."""
        found = pareto_front([self._score(i, metric) for i in self.finished], higher)
        return {self.finished[i] for i in found}

    def _score(self, index: int, metric: str) -> tuple[float, float]:
        point = self.points[index]
        return point.cost, point.metrics.get(metric, math.nan)

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


def tables(report: SweepReport) -> list[Table]:
    """Return the trials by cache size, each with its run, and the scores of the front, if there are any."""
    return [_trials(report), *([_front_scores(report)] if report.by_length else [])]


def _trials(report: SweepReport) -> Table:
    names = [BYTES_PER_TOKEN, *dict.fromkeys((report.metric, RECALL, LOSS))]
    front, finished = report.front, report.finished
    rows = []
    for i, point in enumerate(report.points):
        place = "front" if i in front else "dominated" if i in finished else "stopped early"
        place = "chosen" if i == report.chosen else place
        values = (f"{point.metrics.get(name, float('nan')):.3f}" for name in names)
        rows.append([point.label, *values, str(point.steps), place, point.run_id[:8]])
    note = f"hypervolume {report.hypervolume:.3f} of the rectangle that the finished trials span"
    if report.skipped:
        note += f"; invalid points skipped: {len(report.skipped)}"
    return Table(f"{report.name}: trials", ["settings", *names, "steps", "place", "run"], rows, note)


def _front_scores(report: SweepReport) -> Table:
    front = [report.points[i] for i in sorted(report.front)]
    rows = [
        [setting, *(f"{scores[point.run_id]:.3f}" if point.run_id in scores else "-" for point in front)]
        for setting, scores in report.by_length.items()
    ]
    columns = [f"{point.cost:.1f} bytes per token, run {point.run_id[:8]}" for point in front]
    return Table(f"{report.name}: scores of the front", ["task", *columns], rows)


def verdict(report: SweepReport) -> list[str]:
    """Return sentences on the cost of each setting, over trials that ran to the end, and on the front."""
    whole = [report.points[i] for i in report.finished if math.isfinite(report.points[i].metrics[report.metric])]
    where, steps = f"at {report.length} tokens", max(point.steps for point in report.points)
    found = [
        f"{len(whole)} of {count(len(report.points), 'trial')} ran to the end ({steps} steps); only these are compared."
    ]
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
    elif front and len(whole) > 1:
        found.append(f"One point is better than all others: {front[0].label}, run {front[0].run_id}.")
    chosen = report.points[report.chosen]
    found.append(f"Chosen: {chosen.label}, {chosen.cost:.1f} bytes per token, run {chosen.run_id}.")
    return found


def _effect(key: str, points: Sequence[Point], metric: str, where: str) -> list[str]:
    """Return a sentence on the lowest and highest value of a numeric key, over pairs of trials that differ in it alone.

    Without such a pair, as in a continuous space, halves of the trials are compared if each has two at least.
    """
    values = [point.settings[key] for point in points]
    if not values or any(isinstance(value, bool | str | list) for value in values) or len(set(values)) < 2:
        return []
    lowest, middle, highest = min(values), statistics.median(values), max(values)
    ends = {value: {_others(p, key): p for p in points if p.settings[key] == value} for value in (lowest, highest)}
    matched = [others for others in ends[lowest] if others in ends[highest]]
    if matched:
        low, high = ([ends[value][others] for others in matched] for value in (lowest, highest))
        names = f"{lowest:g} → {highest:g}"
        note = f"{count(len(matched), 'pair')} of trials that differ in nothing else"
    else:
        low = [point for point in points if point.settings[key] < middle]
        high = [point for point in points if point.settings[key] >= middle]
        names = f"below {middle:.3g} → from {middle:.3g}"
        note = f"means over {len(low)} and {len(high)} trials, which also differ in other settings"
        if min(len(low), len(high)) < 2:
            return []
    sizes, scores = (
        [statistics.fmean(point.metrics[name] for point in side) for side in (low, high)]
        for name in (BYTES_PER_TOKEN, metric)
    )
    return [
        f"{key} {names}: cache {sizes[0]:.1f} → {sizes[1]:.1f} bytes per token, {metric} {scores[0]:.3f} → "
        f"{scores[1]:.3f} {where} ({note})."
    ]


def _others(point: Point, key: str) -> str:
    """Return a point's other settings, to find points that differ in ``key`` alone."""
    return repr({name: value for name, value in point.settings.items() if name != key})


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
        scores = [(point.cost, point.metrics.get(name, math.nan)) for point in report.points]
        front = report.front_of(name, higher)
        steps = zip(*sorted(scores[i] for i in front))  # a budget between two points buys the smaller cache's score
        axes.plot(*steps, drawstyle="steps-post", color=_LINE, linewidth=1.2, label="Pareto front", zorder=1)
        for i, (cost, score) in enumerate(scores):
            color = _CHOSEN if i == report.chosen else _FRONT if i in front else _DOMINATED
            face = color if report.points[i].steps == most else "white"
            order = 2 + (len(scores) if i == report.chosen else i)  # no other point covers the chosen one
            axes.scatter(cost, score, s=210, edgecolor=color, facecolor=face, zorder=order)
            ink = "white" if face == color else color
            axes.annotate(str(i + 1), (cost, score), ha="center", va="center", fontsize=8, color=ink, zorder=order)
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
        height = 1 - (i + 1) / (len(report.points) + 1)
        panels[2].text(0, height, text, fontsize=9, color=color, transform=panels[2].transAxes)
    panels[2].set_title(
        "trials with runs (red: chosen, drawn over equal ones; gray: dominated; hollow: stopped early)",
        fontsize=9,
        loc="left",
    )
    return drawn
