"""Tables and the figure of an ablation, from its results alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from model.work import WEIGHTING
from pipelines.recipe.metrics import LOSS
from pipelines.reports.arms import METRICS, Runs, differences, rates_table, score_cells
from pipelines.reports.statistics import estimate, format_estimate, interval_note, seeds_caption, tokens_to
from pipelines.reports.tables import Table

_CLOSED, _MEASURED, _BAND = "#2c5f8a", "#c0392b", "#9aa7b1"


@dataclass(frozen=True)
class ArmResult:
    name: str
    title: str
    rate: float
    """Selected multiple of the recipe's learning rates."""
    rate_losses: dict[str, float | None]
    """Final loss with the first seed by rate."""
    equal_tokens: Runs
    equal_flops: Runs | None = None
    """None where steps cost as many FLOPs as the full recipe's, or where it was not asked for."""

    @property
    def trainings(self) -> list[Runs]:
        return [self.equal_tokens, *([self.equal_flops] if self.equal_flops else [])]


@dataclass(frozen=True)
class CostStage:
    """A stage of the waterfall: the network after one more choice."""

    name: str
    title: str
    cache_bytes: float
    """Closed form, of one sequence of the context."""
    measured_bytes: float
    flops: float
    """Closed form, of decoding the last token of the context."""
    counted_flops: float
    equivalent: float
    """Closed form in FP8 equivalents."""


@dataclass(frozen=True)
class AblationResult:
    name: str
    command: str
    seeds: list[int]
    context: int
    tokens: int
    """Tokens of one training."""
    arms: list[ArmResult]
    waterfall: list[CostStage]
    quantization: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    """Values by variant and metric: QAT against quantization after training."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> AblationResult:
        """Build from plain values, as read from JSON."""
        arms = [
            ArmResult(
                **{
                    **arm,
                    "equal_tokens": Runs(**arm["equal_tokens"]),
                    "equal_flops": None if arm["equal_flops"] is None else Runs(**arm["equal_flops"]),
                }
            )
            for arm in values["arms"]
        ]
        return cls(**{**values, "arms": arms, "waterfall": [CostStage(**stage) for stage in values["waterfall"]]})


# --- tables


def tables(result: AblationResult) -> list[Table]:
    """Return the tables: equal tokens, equal FLOPs, tokens to a loss, quantization, learning rates and costs."""
    found = _scores(result, f"{result.name}: equal tokens ({result.tokens:,})", equal_flops=False)
    if any(arm.equal_flops for arm in result.arms):
        found += _scores(result, f"{result.name}: equal training FLOPs", equal_flops=True)
    found += _tokens_to_loss(result) + _quantization(result)
    rates = [(arm.title, arm.rate, arm.rate_losses) for arm in result.arms]
    return [*found, rates_table(result.name, "arm", rates, result.seeds[0]), _costs(result)]


def _runs(arm: ArmResult, equal_flops: bool) -> Runs:
    return arm.equal_flops or arm.equal_tokens if equal_flops else arm.equal_tokens


def _scores(result: AblationResult, title: str, equal_flops: bool) -> list[Table]:
    """Return a table of the scores, and one of the differences from the full recipe."""
    arms = {arm.title: _runs(arm, equal_flops) for arm in result.arms}
    rows = [
        [name, str(runs.steps), f"{runs.flops:.3g}", *score_cells(runs.metrics, METRICS)] for name, runs in arms.items()
    ]
    scores = Table(title, ["arm", "steps", "FLOPs", *METRICS], rows, interval_note(result.seeds))
    return [scores, differences(f"{title}: difference from the full recipe", arms, result.seeds)]


def _tokens_to_loss(result: AblationResult) -> list[Table]:
    """Return a table of the share of tokens after which the full recipe reaches the final loss of each other arm."""
    full, *others = result.arms
    rows = []
    for arm in others:
        pairs = zip(full.equal_tokens.curves, arm.equal_tokens.metrics[LOSS])
        # The loss of the scored network, which the last point of an arm's curve is not for an arm quantized afterwards.
        shares = [tokens_to(curve, loss) / curve[-1][0] for curve, loss in pairs if curve]
        reached = [share for share in shares if math.isfinite(share)]
        if shares:
            value = format_estimate(estimate(reached), 2) if len(reached) == len(shares) else "-"
            rows.append([arm.title, value, f"{len(reached)} of {len(shares)}"])
    title = f"{result.name}: share of the tokens after which the full recipe has the arm's final validation loss"
    return [Table(title, ["arm", "share", "seeds that reach it"], rows)] if rows else []


def _quantization(result: AblationResult) -> list[Table]:
    if not result.quantization:
        return []
    metrics = list(next(iter(result.quantization.values())))
    rows = [
        [variant, *(format_estimate(estimate(values[name])) for name in metrics)]
        for variant, values in result.quantization.items()
    ]
    title = f"{result.name}: quantization-aware training against quantization after training"
    return [Table(title, ["network", *metrics], rows)]


def _costs(result: AblationResult) -> Table:
    rows = []
    for before, stage in zip([None, *result.waterfall], result.waterfall):
        factor = "" if before is None else f"{before.cache_bytes / stage.cache_bytes:.3g}"
        less = "" if before is None else f"{before.equivalent / stage.equivalent:.3g}"
        rows.append(
            [
                stage.title,
                *(f"{value:,.0f}" for value in (stage.cache_bytes, stage.measured_bytes)),
                factor,
                *(f"{value:,.0f}" for value in (stage.flops, stage.counted_flops, stage.equivalent)),
                less,
            ]
        )
    columns = ["choices", "cache bytes", "measured", "factor", "decode FLOPs", "counted", "FP8 equivalents", "factor"]
    title = f"{result.name}: cost of the choices, one after another, at {result.context:,} tokens"
    note = f"measured: bytes of an allocated and filled cache; counted: on PyTorch's operators; {WEIGHTING}"
    return Table(title, columns, rows, note)


# --- figure


def figure(result: AblationResult) -> Figure:
    """Draw the waterfall of cache bytes and FLOPs, and below each choice the quality without it."""
    stages = result.waterfall
    drawn = Figure(figsize=(1.9 * len(stages) + 2.6, 10.5), layout="constrained")
    cache, work, loss, recall = drawn.subplots(4, 1, height_ratios=(1.2, 1.2, 1, 1))
    _bars(cache, [s.cache_bytes for s in stages], [s.measured_bytes for s in stages], "measured")
    _bars(work, [s.flops for s in stages], [s.counted_flops for s in stages], "counted")
    cache.set(ylabel="bytes", title=f"cache of one sequence of {result.context:,} tokens")
    work.set(ylabel="FLOPs", title=f"decoding token {result.context:,}")
    by_name = {arm.name: arm for arm in result.arms}
    for axes, name in ((loss, "validation loss"), (recall, "recall")):
        _quality(axes, result, by_name, METRICS[name])
        axes.set(ylabel=name, title=f"{name} without the choice, equal tokens")
    for axes in (cache, work, loss, recall):
        without = axes in (loss, recall)
        titles = [stage.title.replace("+", "without") if without else stage.title for stage in stages]
        axes.set_xticks(range(len(stages)), titles, fontsize=9)
        axes.set_xlim(-0.6, len(stages) - 0.4)
    drawn.supxlabel(seeds_caption(result.seeds, "Bars: 95% t intervals. Band: the full recipe."), fontsize=9)
    return drawn


def _bars(axes: Axes, closed: Sequence[float], measured: Sequence[float], label: str) -> None:
    axes.bar([i - 0.2 for i in range(len(closed))], closed, 0.38, color=_CLOSED, label="closed form")
    axes.bar([i + 0.2 for i in range(len(measured))], measured, 0.38, color=_MEASURED, label=label)
    for i, (before, after) in enumerate(itertools.pairwise(closed), 1):
        ratio = before / after
        text = "× 1" if abs(ratio - 1) < 0.005 else f"÷ {ratio:.3g}" if ratio > 1 else f"× {1 / ratio:.3g}"
        axes.annotate(text, (i, max(after, measured[i])), ha="center", va="bottom", fontsize=10)
    total = closed[0] / closed[-1]
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(min(closed) / 2, high * (high / low) ** 0.25)
    change = f"÷ {total:.3g}" if total > 1 else f"× {1 / total:.3g}"
    axes.text(0.99, 0.93, f"in all {change}", transform=axes.transAxes, ha="right", va="top", fontsize=10)
    axes.legend(fontsize=8, loc="upper center", ncols=2)
    axes.grid(alpha=0.25, axis="y")


def _quality(axes: Axes, result: AblationResult, arms: dict[str, ArmResult], metric: str) -> None:
    if metric not in result.arms[0].equal_tokens.metrics:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", va="center", fontsize=10)
        return
    full = estimate(result.arms[0].equal_tokens.metrics[metric])
    half = full.half_width or 0.0
    axes.axhspan(full.mean - half, full.mean + half, color=_BAND, alpha=0.3, linewidth=0)
    axes.axhline(full.mean, color=_CLOSED, linewidth=1.2, label="full recipe")
    for index, stage in enumerate(result.waterfall):
        arm = arms.get(stage.name)
        if arm is None:
            continue
        found = estimate(arm.equal_tokens.metrics[metric])
        axes.errorbar(index, found.mean, yerr=found.half_width, fmt="o", color=_MEASURED, capsize=4, zorder=3)
        axes.plot([index] * len(found.values), found.values, ".", color=_MEASURED, alpha=0.5, markersize=5)
        label = f" {found.mean:.3f}"
        axes.annotate(label, (index, found.mean), xytext=(8, 0), textcoords="offset points", va="center", fontsize=9)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, loc="best")
