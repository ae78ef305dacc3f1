"""Tables and figures of a comparison of networks, from its results alone."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from evals.documents import TASKS
from evals.scores import Point
from model.work import WEIGHTING
from pipelines.reports.arms import METRICS, TESTED, Runs, differences, rates_table, score_cells
from pipelines.reports.figures import LENGTHS, binary
from pipelines.reports.statistics import estimate, format_estimate, interval_note, seeds_caption, too_few
from pipelines.reports.tables import Table

PUBLISHED_LENGTH = 1 << 20
"""Sequence length of the published networks' costs."""
SSA_NOTE = "accounting only: an assumption about an unpublished design, not trained"
_COLORS = ("#2c5f8a", "#7f8c8d", "#c0392b", "#2e8b57", "#8e44ad", "#d98e04", "#16a085")


@dataclass(frozen=True)
class NetworkCosts:
    """Costs of one sequence at LENGTHS: cache bytes, FLOPs of decoding the last token, and FP8 equivalents."""

    cache_bytes: list[float]
    flops: list[float]
    equivalent: list[float]
    measured_bytes: list[int | None]
    """None for a cache too large to measure, and for SSA."""


@dataclass(frozen=True)
class ComparedArm:
    name: str
    parameters: int
    active: int
    rate: float
    rate_losses: dict[str, float | None]
    runs: Runs
    costs: NetworkCosts
    decode_seconds: list[float]
    """Median time of a decoded token at each of the timed lengths."""
    prefill_seconds: list[float | None]
    """Time of a prompt at each of the timed lengths; None for longer prompts than asked for."""


@dataclass(frozen=True)
class PublishedCosts:
    """Closed forms of a published network at one length."""

    name: str
    bytes_per_token: float
    cache_bytes: float
    equivalent: float


@dataclass(frozen=True)
class ComparisonResult:
    name: str
    command: str
    seeds: list[int]
    tokens: int
    """Tokens of one training."""
    training_length: int
    timed_lengths: list[int]
    machine: str
    arms: list[ComparedArm]
    """The hybrid first."""
    ssa: NetworkCosts
    ssa_rule: str
    published: list[PublishedCosts]
    """V3.2 first, then networks of V4, at PUBLISHED_LENGTH tokens."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ComparisonResult:
        """Build from plain values, as read from JSON."""
        arms = [
            ComparedArm(**{**arm, "runs": Runs(**arm["runs"]), "costs": NetworkCosts(**arm["costs"])})
            for arm in values["arms"]
        ]
        published = [PublishedCosts(**each) for each in values["published"]]
        return cls(**{**values, "arms": arms, "ssa": NetworkCosts(**values["ssa"]), "published": published})


def task_scores(metrics: dict[str, list[float]]) -> dict[str, dict[int, list[float]]]:
    """Return {task: {length: one score per seed}}, averaged over the depths of a length, from metrics of
    :func:`evals.run.evaluate`. The score of perplexity is ``likelihood``, that of other tasks ``recall``."""
    grouped: dict[str, dict[int, list[list[float]]]] = {}
    for name, values in metrics.items():
        match Point.parse(name):
            case point, "recall" | "likelihood":
                grouped.setdefault(point.task, {}).setdefault(point.length, []).append(values)
    return {
        task: {
            length: [sum(column) / len(column) for column in zip(*settings)]
            for length, settings in sorted(lengths.items())
        }
        for task, lengths in grouped.items()
    }


# --- tables


def tables(result: ComparisonResult) -> list[Table]:
    """Return the tables: quality, tasks, cache, FLOPs, time, learning rates and the published networks."""
    rates = [(arm.name, arm.rate, arm.rate_losses) for arm in result.arms]
    return [
        *_quality(result),
        *_tasks(result),
        _cache(result),
        _flops(result),
        _times(result),
        rates_table(result.name, "network", rates, result.seeds[0]),
        published_table(result),
    ]


def _quality(result: ComparisonResult) -> list[Table]:
    title = f"{result.name}: {result.tokens:,} tokens each"
    rows = [
        [
            arm.name,
            f"{arm.parameters:,}",
            f"{arm.active:,}",
            f"{arm.runs.flops:.3g}",
            *score_cells(arm.runs.metrics, METRICS),
        ]
        for arm in result.arms
    ]
    columns = ["network", "parameters", "active", "training FLOPs", *METRICS]
    arms = {arm.name: arm.runs for arm in result.arms}
    return [
        Table(title, columns, rows, interval_note(result.seeds)),
        differences(f"{title}: difference from the hybrid", arms, result.seeds),
    ]


def _tasks(result: ComparisonResult) -> list[Table]:
    by_arm = {arm.name: task_scores(arm.runs.metrics) for arm in result.arms}
    found = []
    for task, lengths in by_arm[result.arms[0].name].items():
        rows = [
            [
                name,
                *(
                    format_estimate(estimate(scores[task][length]), 3) if length in scores.get(task, {}) else "-"
                    for length in lengths
                ),
            ]
            for name, scores in by_arm.items()
        ]
        found.append(Table(f"{result.name}: {task} by length", ["network", *map(str, lengths)], rows))
    return found


def _cache(result: ComparisonResult) -> Table:
    rows = []
    for name, costs in _all_costs(result):
        cells = []
        for closed, measured in zip(costs.cache_bytes, costs.measured_bytes):
            cells.append(f"{closed:,.0f}" if measured is None else f"{closed:,.0f} ({measured / closed - 1:+.1%})")
        rows.append([name, *cells])
    note = f"in brackets: measured against the closed form. SSA: {SSA_NOTE}"
    return Table(f"{result.name}: cache of one sequence, bytes", ["network", *map(binary, LENGTHS)], rows, note)


def _flops(result: ComparisonResult) -> Table:
    rows = [[name, *(f"{value:.4g}" for value in costs.flops)] for name, costs in _all_costs(result)]
    note = f"closed form. SSA: {SSA_NOTE}"
    return Table(f"{result.name}: decoding one token, FLOPs", ["network", *map(binary, LENGTHS)], rows, note)


def _all_costs(result: ComparisonResult) -> list[tuple[str, NetworkCosts]]:
    return [*((arm.name, arm.costs) for arm in result.arms), ("SSA (assumption)", result.ssa)]


def _times(result: ComparisonResult) -> Table:
    rows = []
    for arm in result.arms:
        decode = [f"{1e3 * seconds:.3g}" for seconds in arm.decode_seconds]
        prefill = ["-" if seconds is None else f"{1e3 * seconds:.4g}" for seconds in arm.prefill_seconds]
        rows.append([arm.name, *decode, *prefill])
    lengths = list(map(binary, result.timed_lengths))
    columns = ["network", *(f"decode {n}" for n in lengths), *(f"prefill {n}" for n in lengths)]
    return Table(f"{result.name}: milliseconds per decoded token and per prompt", columns, rows, result.machine)


def published_table(result: ComparisonResult) -> Table:
    """Return the table of V3.2 against V4 at a million tokens, in closed form."""
    first = result.published[0]
    rows = [
        [
            each.name,
            f"{each.bytes_per_token:,.1f}",
            f"{each.cache_bytes / 1e9:,.2f}",
            f"{each.cache_bytes / first.cache_bytes:.1%}",
            f"{each.equivalent / 1e9:,.1f}",
            f"{each.equivalent / first.equivalent:.1%}",
        ]
        for each in result.published
    ]
    columns = ["network", "bytes per token", "cache, GB", "of V3.2's", "decode GFLOP, FP8 equivalents", "of V3.2's"]
    title = f"DeepSeek-V3.2 and V4 at {PUBLISHED_LENGTH:,} tokens, closed form"
    note = f"{WEIGHTING}. Published: 10% (Pro) and 7% (Flash) of the cache, 27% and 10% of the FLOPs"
    return Table(title, columns, rows, note)


def own_table(result: ComparisonResult) -> Table:
    """Return the mission's table with the trained networks: cache and FLOPs against V3.2's, and quality."""
    base = next((arm for arm in result.arms if arm.name == "v32"), result.arms[0])
    rows = []
    for arm in result.arms:
        scores = score_cells(arm.runs.metrics, {name: METRICS[name] for name in TESTED})
        size, work = arm.costs.cache_bytes[-1], arm.costs.equivalent[-1]
        shares = (size / base.costs.cache_bytes[-1], work / base.costs.equivalent[-1])
        rows.append([arm.name, f"{size / 1e6:,.1f}", f"{shares[0]:.1%}", f"{work / 1e6:,.1f}", f"{shares[1]:.1%}"])
        rows[-1] += scores
    columns = ["network", "cache, MB", f"of {base.name}'s", "decode MFLOP, FP8 equivalents", f"of {base.name}'s"]
    title = f"{result.name}: the trained networks at {binary(LENGTHS[-1])} tokens"
    note = too_few(result.seeds) or "costs in closed form; scores: mean ± half width of the 95% t interval over seeds"
    return Table(title, [*columns, *TESTED], rows, note)


# --- figures


def costs_figure(result: ComparisonResult) -> Figure:
    """Draw cache bytes and decode FLOPs over the sequence length. Dots are measured, SSA is dashed."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    cache, work = figure.subplots(1, 2)
    for (name, costs), color in zip(_all_costs(result), itertools.cycle(_COLORS)):
        style = "--" if costs is result.ssa else "-"
        cache.plot(LENGTHS, costs.cache_bytes, style, color=color, label=name)
        measured = [(n, size) for n, size in zip(LENGTHS, costs.measured_bytes) if size is not None]
        if measured:
            cache.plot(*zip(*measured), "o", color=color, markersize=5)
        work.plot(LENGTHS, costs.flops, style, color=color, label=name)
    cache.set(title="cache of one sequence, fixed state included", ylabel="bytes")
    work.set(title="decoding one token, closed form", ylabel="FLOPs")
    for axes in (cache, work):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(LENGTHS, list(map(binary, LENGTHS)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("tokens in the sequence")
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8)
    figure.supxlabel(f"Dots: measured. Dashed: {SSA_NOTE}.", fontsize=8)
    return figure


def quality_figure(result: ComparisonResult) -> Figure:
    """Draw validation loss over the tokens seen, and final loss and recall of every network."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    curve, *bars = figure.subplots(1, 3, width_ratios=(1.4, 1, 1))
    for arm, color in zip(result.arms, itertools.cycle(_COLORS)):
        _draw_curves(curve, arm.runs.curves, color, arm.name)
    curve.set(xlabel="tokens seen", ylabel="validation loss, nats per token", title="validation loss")
    curve.legend(fontsize=8)
    for axes, name in zip(bars, TESTED):
        for index, (arm, color) in enumerate(zip(result.arms, itertools.cycle(_COLORS))):
            if METRICS[name] not in arm.runs.metrics:
                continue
            found = estimate(arm.runs.metrics[METRICS[name]])
            axes.errorbar(index, found.mean, yerr=found.half_width, fmt="o", color=color, capsize=4)
            axes.plot([index] * len(found.values), found.values, ".", color=color, alpha=0.5)
        axes.set_xticks(range(len(result.arms)), [arm.name for arm in result.arms])
        axes.set(title=f"{name} at the end")
    for axes in (curve, *bars):
        axes.grid(alpha=0.25)
    figure.supxlabel(seeds_caption(result.seeds, "Bars: 95% t intervals; bands: ranges."), fontsize=8)
    return figure


def lengths_figure(result: ComparisonResult) -> Figure | None:
    """Draw the score of every task over the document length; None without tasks."""
    by_arm = {arm.name: task_scores(arm.runs.metrics) for arm in result.arms}
    tasks = list(by_arm[result.arms[0].name])
    if not tasks:
        return None
    columns = min(3, len(tasks))
    rows = -(-len(tasks) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.6 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, task in zip(panels, tasks):
        for index, ((name, scores), color) in enumerate(zip(by_arm.items(), itertools.cycle(_COLORS))):
            beside = 2 ** (0.04 * (index - (len(by_arm) - 1) / 2))  # equal scores stay visible
            found = {length: estimate(values) for length, values in scores.get(task, {}).items()}
            if found:
                means = [each.mean for each in found.values()]
                # A score is from 0 to 1; a t interval may exceed that.
                low = [min(each.half_width or 0.0, each.mean) for each in found.values()]
                high = [min(each.half_width or 0.0, 1 - each.mean) for each in found.values()]
                lengths = [length * beside for length in found]
                axes.errorbar(lengths, means, yerr=[low, high], marker="o", capsize=3, color=color, label=name)
        lengths = sorted({length for scores in by_arm.values() for length in scores.get(task, {})})
        axes.axvline(result.training_length, color="#9aa7b1", linestyle=":", linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, list(map(str, lengths)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set(title=task, xlabel="document length, tokens", ylabel=TASKS[task].metric, ylim=(-0.05, 1.05))
        axes.grid(alpha=0.25)
    for axes in panels[len(tasks) :]:
        axes.axis("off")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(by_arm))
    caption = seeds_caption(result.seeds, "Bars: 95% t intervals, cut at 0 and 1.")
    figure.supxlabel(f"{caption} Dotted: training length.", fontsize=8)
    return figure


def _draw_curves(axes: Any, curves: Sequence[Sequence[tuple[int, float]]], color: str, label: str) -> None:
    """Plot the mean of curves over the same tokens, with the range as a band."""
    tokens = [point[0] for point in curves[0]]
    columns = [[value for _, value in column] for column in zip(*curves)]
    tokens = tokens[: len(columns)]
    axes.plot(tokens, [sum(column) / len(column) for column in columns], color=color, label=label)
    axes.fill_between(tokens, list(map(min, columns)), list(map(max, columns)), color=color, alpha=0.15, linewidth=0)
