"""Caches of the released shapes at a million tokens: storages and resident memory against the closed form.

    python -m benchmarks.cache_at_a_million [--preset NAME ...] [--tokens N] [--write docs/cache-at-a-million.md]

Each cache is allocated and filled with random entries in a process of its own, one after the other. Beside each stands
GQA-8 in BF16 at the same depth, measured at a length that fits. Fails where a size is more than 1% off.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

from matplotlib.figure import Figure

from benchmarks import report
from benchmarks.harness import Findings, benchmark, command_line, count, options_of
from benchmarks.timing import in_child
from model.cache import COMPONENTS
from model.comparison import gqa8_account, with_gqa8
from model.config import ModelConfig
from model.errors import FiftyfoldError
from model.presets import PRESETS
from pipelines.reports.cache_measurement import Measurement, measure_cache
from pipelines.reports.figures import binary

COLORS = {
    "csa": "#2c5f8a",
    "hca": "#c0392b",
    "index": "#e0a030",
    "window": "#5b8c5a",
    "tail": "#8e6c8a",
    "gqa": "#7f8c8d",
}
LABELS = {"index": "index keys", "window": "windows", "tail": "tails"}


@dataclass(frozen=True)
class Pair:
    """A preset's cache, and that of GQA-8 at its depth."""

    name: str
    own: Measurement
    gqa: Measurement
    gqa_bytes: float
    """Closed form at the tokens of ``own``."""

    @property
    def times(self) -> float:
        return self.gqa_bytes / self.own.measured


def measure(name: str, tokens: int, gqa_tokens: int) -> Pair:
    config = ModelConfig.from_preset(name)
    own = in_child(measure_cache, config, tokens)
    gqa = in_child(measure_cache, with_gqa8(config), gqa_tokens)
    return Pair(name, own, gqa, gqa8_account(config).cache_bytes(tokens))


def tables(pairs: list[Pair]) -> str:
    """Markdown: what was measured, and what GQA-8 would need."""
    parts = [part for part in COMPONENTS if any(part in p.own.components for p in pairs)]
    rows = []
    for p in pairs:
        for name, m in ((p.name, p.own), ("GQA-8, BF16, of its depth", p.gqa)):
            cells = [f"{m.components[part][0] / 1e6:,.2f}" if part in m.components else "" for part in parts]
            cells += [f"{size / 1e6:,.2f}" for size in (m.measured, m.closed_form)]
            cells += [_off(m.measured, m), f"{m.resident / 1e6:,.2f}", _off(m.resident, m)]
            rows.append([f"{name}, {m.tokens:,} tokens", *cells])
    labels = [LABELS.get(part, part) for part in parts]
    header = ["cache, MB", *labels, "all storages", "closed form", "off by", "resident", "off by"]
    beside = []
    for p in pairs:
        per_token = (f"{m.measured / m.tokens:,.2f}" for m in (p.own, p.gqa))
        whole = (f"{p.own.measured / 1e9:,.2f} GB", f"{p.gqa_bytes / 1e9:,.1f} GB")
        beside.append([f"{p.name}, {p.own.tokens:,}", *per_token, *whole, f"{p.times:.1f}"])
    names = ["at as many tokens", "bytes per token", "GQA-8, bytes per token", "cache", "GQA-8, closed form", "times"]
    return f"{report.table(header, rows)}\n{report.table(names, beside)}"


def _off(measured: int, m: Measurement) -> str:
    return f"{measured / m.closed_form - 1:+.3%}"


def worst(pairs: list[Pair]) -> float:
    """The largest relative difference of storages or resident memory from the closed form."""
    measurements = [m for p in pairs for m in (p.own, p.gqa)]
    return max(abs(size / m.closed_form - 1) for m in measurements for size in (m.measured, m.resident))


def draw(pairs: list[Pair]) -> Figure:
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    parts, beside = figure.subplots(1, 2, width_ratios=(1.25, 1))
    places = range(len(pairs))
    bottom = [0.0] * len(pairs)
    for part, color in COLORS.items():
        heights = [p.own.components.get(part, (0, 0))[0] / 1e9 for p in pairs]
        if any(heights):
            parts.bar(places, heights, 0.5, bottom, color=color, label=LABELS.get(part, part))
            bottom = [low + height for low, height in zip(bottom, heights)]
    parts.plot(places, [p.own.resident / 1e9 for p in pairs], "kD", markersize=6, label="resident memory, growth")
    for place, p in zip(places, pairs):
        parts.hlines(p.own.closed_form / 1e9, place - 0.36, place + 0.36, "black", "--", linewidth=1)
        text = f"{p.own.measured / 1e9:.2f} GB, resident {_off(p.own.resident, p.own)}"
        parts.annotate(text, (place, p.own.measured / 1e9), (0, 9), textcoords="offset points", ha="center")
    parts.plot([], [], "k--", linewidth=1, label="closed form")
    parts.set_title(f"one sequence of {binary(pairs[0].own.tokens)} tokens, measured", fontsize=11)
    parts.set_xlim(-0.6, len(pairs) - 0.4)
    parts.legend(fontsize=8, loc="upper left")
    for place, p in zip(places, pairs):
        beside.bar(place - 0.2, p.own.measured / 1e9, 0.36, color=COLORS["csa"], label="packed cache, measured")
        beside.bar(
            place + 0.2,
            p.gqa_bytes / 1e9,
            0.36,
            facecolor="white",
            edgecolor=COLORS["gqa"],
            hatch="//",
            label=f"GQA-8, BF16, of the same depth: closed form\n(measured at {binary(p.gqa.tokens)} tokens)",
        )
        for offset, size in ((-0.2, p.own.measured), (0.2, p.gqa_bytes)):
            text = f"{size / 1e9:.1f} GB" + (f"\n{p.times:.1f} times" if offset > 0 else "")
            beside.annotate(
                text, (place + offset, size / 1e9), (0, 3), textcoords="offset points", ha="center", fontsize=9
            )
    handles, labels = beside.get_legend_handles_labels()
    beside.legend(handles[:2], labels[:2], fontsize=8, loc="upper left")
    beside.set_title("beside grouped-query attention", fontsize=11)
    for axes, room in ((parts, 1.75), (beside, 1.45)):
        axes.set_xticks(places, [p.name for p in pairs])
        axes.set_ylabel("GB")
        axes.set_ylim(0, axes.dataLim.y1 * room)
        axes.grid(axis="y", alpha=0.25)
        axes.set_axisbelow(True)
    return figure


def run(options: argparse.Namespace) -> Findings:
    pairs = []
    for name in options.preset:
        pairs.append(measure(name, options.tokens, options.gqa_tokens))
        print(f"{name}: done", file=sys.stderr, flush=True)
    text = tables(pairs)
    off = 100 * worst(pairs)
    if off > options.within:
        raise FiftyfoldError(f"a size is {off:.2f}% off its closed form, more than {options.within}%:\n\n{text}")
    return Findings(text, draw(pairs), "Measured bytes by component, and beside grouped-query attention")


def main(arguments: list[str] | None = None) -> str:
    parser = options_of(__doc__)
    parser.add_argument("--preset", nargs="+", choices=list(PRESETS), default=["v4-flash", "v4-pro"])
    parser.add_argument("--tokens", type=count, default=1 << 20)
    parser.add_argument("--gqa-tokens", type=count, default=1 << 14, help="the length at which GQA-8 is measured")
    parser.add_argument("--within", type=float, default=1.0, help="percent that a size may be off")
    return benchmark(parser, run, arguments)


if __name__ == "__main__":
    command_line(main)
