"""Figures of the budget step, drawn with matplotlib's object interface: no window, no global state."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from model.config import ModelConfig
from model.costs import WEIGHTING, CostModel, Crossover
from pipelines.reports.figures import binary

_OWN, _LINE = "#2c5f8a", "#9aa7b1"
_REFERENCES = ("#c0392b", "#7f8c8d")
_SHADED = "Gray: extrapolation beyond the model's maximum positions. "
_CLOSE = 1.5
"""Ratio of two crossovers below which their labels would touch."""
_PARTS = {"index": "#2c5f8a", "core": "#c0392b", "rest": "#7f8c8d", "attention": "#222222"}


def budget_figure(
    lengths: Sequence[int],
    own: CostModel,
    references: Sequence[CostModel],
    crossings: Mapping[str, Crossover],
    config: ModelConfig,
) -> Figure:
    """Draw cache bytes and decode FLOPs against sequence length beside references, and the model's FLOPs by part.

    Dots mark where the closed forms cross.

    Args:
        crossings: Computed crossover lengths by key.
    """
    figure = Figure(figsize=(15, 5.4), layout="constrained")
    cache, total, parts = figure.subplots(1, 3)
    colors = (_OWN, *_REFERENCES)
    for account, color in zip((own, *references), colors):
        width = 2.2 if account is own else 1.5
        cache.plot(lengths, [account.cache_bytes(n) for n in lengths], color=color, linewidth=width, label=account.name)
        total.plot(lengths, [account.equivalent(n) for n in lengths], color=color, linewidth=width, label=account.name)
    if own.fixed and own.per_token:
        entries = [own.bytes_per_token * n for n in lengths]
        cache.plot(lengths, entries, color=_OWN, linestyle="--", linewidth=1.1, label=f"{own.name}: growing entries")
        fixed = sum(own.fixed.values())
        cache.axhline(fixed, color=_OWN, linestyle=":", linewidth=1.2, label=f"{own.name}: fixed state")
    cache.set(title="cache of one sequence, fixed state included", ylabel="bytes")
    total.set(title="decoding one token, all operations", ylabel="FLOPs (FP8 equivalents)")

    def work(n: int, *kinds: str) -> float:
        return sum(part.flops for part in own.work(n) if part.kind in kinds)

    lines = (
        ("index scores", "index", "-", ("index",)),
        ("core attention", "core", "-", ("core",)),
        ("index scores and core attention", "attention", "--", ("index", "core")),
        ("everything else", "rest", "-", ("linear", "residual")),
    )
    for label, key, style, kinds in lines:
        values = [work(n, *kinds) for n in lengths]
        if any(values):
            parts.plot(lengths, values, color=_PARTS[key], linestyle=style, linewidth=1.6, label=label)
    for part, style in (("core attention, csa", ":"), ("core attention, hca", "-.")):
        values = [sum(w.flops for w in own.work(n) if w.part == part) for n in lengths]
        if all(values):
            parts.plot(lengths, values, color=_PARTS["core"], linestyle=style, linewidth=1.1, label=part)
    parts.set(title="decoding one token: the model's parts", ylabel="FLOPs (raw)")

    crossover = {key: crossing.tokens for key, crossing in crossings.items()}
    _mark(cache, lengths, [(crossover.get("fixed"), lambda n: own.bytes_per_token * n)])
    dominant = crossings["attention"].tokens_equivalent if "attention" in crossings else None
    _mark(total, lengths, [(dominant, own.equivalent)], f"{own.name}: attention and index dominate from here")
    _mark(
        parts,
        lengths,
        [
            (crossover.get("hca"), lambda n: sum(w.flops for w in own.work(n) if w.part == "core attention, csa")),
            (crossover.get("index"), lambda n: work(n, "core")),
            (crossover.get("attention"), lambda n: work(n, "linear", "residual")),
        ],
    )
    for axes in (cache, total, parts):
        _format_lengths(axes, lengths, config.max_positions)
    figure.supxlabel(
        f"Dots: lengths at which the closed forms cross. {_SHADED}{WEIGHTING[0].upper()}{WEIGHTING[1:]}.",
        fontsize=8,
        wrap=True,
    )
    return figure


def _mark(
    axes: Axes,
    lengths: Sequence[int],
    crossings: Sequence[tuple[int | None, Callable[[int], float]]],
    label: str = "",
) -> None:
    """Mark crossovers within ``lengths``, pairs of tokens and height, with a dot, a vertical line and a label."""
    found = sorted((n, height(n)) for n, height in crossings if n is not None and lengths[0] <= n <= lengths[-1])
    for (tokens, height), (following, _) in zip(found, [*found[1:], (math.inf, 0.0)]):
        axes.vlines(tokens, 0, height, color="black", linewidth=0.7, alpha=0.6)
        axes.plot(tokens, height, "o", color="black", markersize=5, zorder=5, label=label or None)
        axes.text(
            tokens,
            0.015,
            f" {binary(tokens)}",
            transform=axes.get_xaxis_transform(),
            rotation=90,
            fontsize=9,
            ha="right" if following < _CLOSE * tokens else "left",  # away from the next label
            va="bottom",
            zorder=6,
        )


_COMPARED = ("#2c5f8a", "#c0392b", "#2e8b57", "#8e44ad", "#7f8c8d")
_ASSUMED = "#d98e04"


def comparison_figure(
    lengths: Sequence[int],
    networks: Sequence[CostModel],
    assumption: CostModel,
    measured: Sequence[tuple[int, int]],
    max_positions: int,
) -> Figure:
    """Draw cache bytes and decode FLOPs against sequence length, with a line per network.

    Args:
        networks: The model, then at most four others.
        assumption: A network that is not implemented, drawn dashed.
        measured: Tokens and bytes of measured caches, in the order of ``networks``, drawn as dots.
        max_positions: Tokens beyond which the model's costs are extrapolated.
    """
    figure = Figure(figsize=(12, 5.4), layout="constrained")
    cache, work = figure.subplots(1, 2)
    lines = [(network, color, "-") for network, color in zip(networks, _COMPARED)]
    for network, color, style in (*lines, (assumption, _ASSUMED, "--")):
        own = network is networks[0]
        for axes, cost in ((cache, network.cache_bytes), (work, network.flops)):
            axes.plot(
                lengths,
                [cost(n) for n in lengths],
                color=color,
                linestyle=style,
                linewidth=2.4 if own else 1.6,
                zorder=3 if own else 2,
                label=network.name,
            )
    for (tokens, size), color in zip(measured, _COMPARED):
        cache.plot(tokens, size, "o", color=color, markersize=6, zorder=4)
    cache.set(title="cache of one sequence, fixed state included", ylabel="bytes")
    work.set(title="decoding one token, all operations", ylabel="FLOPs")
    for axes in (cache, work):
        _format_lengths(axes, lengths, max_positions)
    dots = "Dots: measured. " if measured else ""
    shaded = _SHADED if max_positions < lengths[-1] else ""
    figure.supxlabel(
        f"{dots}{shaded}Equal width, number of layers, number of heads and feed-forward. Dashed: an assumption, not a "
        "published design, with the cache of GQA.",
        fontsize=8,
        wrap=True,
    )
    return figure


def _format_lengths(axes: Axes, lengths: Sequence[int], max_positions: int) -> None:
    """Format logarithmic axes over sequence lengths. Lengths beyond ``max_positions`` are shaded."""
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlim(lengths[0], lengths[-1])
    axes.set_xticks([n for n in (1 << i for i in range(0, 64, 2)) if lengths[0] <= n <= lengths[-1]])
    axes.xaxis.set_major_formatter(lambda n, _: binary(n))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("tokens in the sequence")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, loc="upper left")
    low, high = axes.get_ylim()
    axes.set_ylim(low / (high / low) ** 0.05, high * (high / low) ** 0.22)  # room for labels and legend
    if max_positions < lengths[-1]:
        axes.axvspan(max_positions, lengths[-1], color=_LINE, alpha=0.18, linewidth=0)
