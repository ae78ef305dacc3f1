"""Cache size of the released models at a million tokens: storages and resident memory against the closed form.

    python -m benchmarks.cache_at_a_million [--preset NAME ...] [--tokens N] [--write docs/cache-at-a-million.md]

Each cache is allocated and filled with random entries in a separate process. The baseline is GQA-8 in BF16 with as many
layers, measured at a length that fits into memory. Fails if a size is more than 1% off.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

from matplotlib.figure import Figure

from benchmarks.lib import report
from benchmarks.lib.harness import Result, make_parser, positive_int, run_benchmark, run_main
from benchmarks.lib.timing import run_in_subprocess
from model.config import ModelConfig
from model.costs import gqa8_costs, with_gqa8
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
    "mla": "#8e44ad",
    "dsa": "#2e8b57",
    "state": "#3b3b3b",
}
LABELS = {"index": "index keys", "window": "windows", "tail": "tails"}


@dataclass(frozen=True)
class Pair:
    """Cache of a preset, and of GQA-8 with as many layers."""

    name: str
    own: Measurement
    gqa: Measurement
    gqa_bytes: float
    """Closed form at the length of ``own``."""

    @property
    def reduction(self) -> float:
        return self.gqa_bytes / self.own.measured


def measure(name: str, tokens: int, gqa_tokens: int) -> Pair:
    config = ModelConfig.from_preset(name)
    own = run_in_subprocess(measure_cache, config, tokens)
    gqa = run_in_subprocess(measure_cache, with_gqa8(config), gqa_tokens)
    return Pair(name, own, gqa, gqa8_costs(config).cache_bytes(tokens))


def tables(pairs: list[Pair]) -> str:
    """Format the measured sizes, and the comparison with GQA-8."""
    parts = [part for part in COLORS if any(part in p.own.components for p in pairs)]
    rows = []
    for p in pairs:
        for name, m in ((p.name, p.own), ("GQA-8, BF16, of its depth", p.gqa)):
            cells = [f"{m.components[part][0] / 1e6:,.2f}" if part in m.components else "" for part in parts]
            cells += [f"{size / 1e6:,.2f}" for size in (m.measured, m.closed_form)]
            cells += [_error(m.measured, m), f"{m.resident / 1e6:,.2f}", _error(m.resident, m)]
            rows.append([f"{name}, {m.tokens:,} tokens", *cells])
    labels = [LABELS.get(part, part) for part in parts]
    header = ["cache, MB", *labels, "all storages", "closed form", "off by", "resident", "off by"]
    comparison = []
    for p in pairs:
        per_token = (f"{m.measured / m.tokens:,.2f}" for m in (p.own, p.gqa))
        total = (f"{p.own.measured / 1e9:,.2f} GB", f"{p.gqa_bytes / 1e9:,.1f} GB")
        comparison.append([f"{p.name}, {p.own.tokens:,}", *per_token, *total, f"{p.reduction:.1f}"])
    names = ["at as many tokens", "bytes per token", "GQA-8, bytes per token", "cache", "GQA-8, closed form", "times"]
    return f"{report.table(header, rows)}\n{report.table(names, comparison)}"


def _error(measured: int, m: Measurement) -> str:
    return f"{measured / m.closed_form - 1:+.3%}"


def largest_error(pairs: list[Pair]) -> float:
    """Return the largest relative error of storages or resident memory against the closed form."""
    measurements = [m for p in pairs for m in (p.own, p.gqa)]
    return max(abs(size / m.closed_form - 1) for m in measurements for size in (m.measured, m.resident))


def draw(pairs: list[Pair]) -> Figure:
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    components, comparison = figure.subplots(1, 2, width_ratios=(1.25, 1))
    positions = range(len(pairs))
    bottom = [0.0] * len(pairs)
    for part, color in COLORS.items():
        heights = [p.own.components.get(part, (0, 0))[0] / 1e9 for p in pairs]
        if any(heights):
            components.bar(positions, heights, 0.5, bottom, color=color, label=LABELS.get(part, part))
            bottom = [low + height for low, height in zip(bottom, heights)]
    components.plot(
        positions, [p.own.resident / 1e9 for p in pairs], "kD", markersize=6, label="resident memory, growth"
    )
    for position, p in zip(positions, pairs):
        components.hlines(p.own.closed_form / 1e9, position - 0.36, position + 0.36, "black", "--", linewidth=1)
        text = f"{p.own.measured / 1e9:.2f} GB, resident {_error(p.own.resident, p.own)}"
        components.annotate(text, (position, p.own.measured / 1e9), (0, 9), textcoords="offset points", ha="center")
    components.plot([], [], "k--", linewidth=1, label="closed form")
    components.set_title(f"one sequence of {binary(pairs[0].own.tokens)} tokens, measured", fontsize=11)
    components.set_xlim(-0.6, len(pairs) - 0.4)
    components.legend(fontsize=8, loc="upper left")
    for position, p in zip(positions, pairs):
        comparison.bar(position - 0.2, p.own.measured / 1e9, 0.36, color=COLORS["csa"], label="packed cache, measured")
        comparison.bar(
            position + 0.2,
            p.gqa_bytes / 1e9,
            0.36,
            facecolor="white",
            edgecolor=COLORS["gqa"],
            hatch="//",
            label=f"GQA-8, BF16, of the same depth: closed form\n(measured at {binary(p.gqa.tokens)} tokens)",
        )
        for offset, size in ((-0.2, p.own.measured), (0.2, p.gqa_bytes)):
            text = f"{size / 1e9:.1f} GB" + (f"\n{p.reduction:.1f} times" if offset > 0 else "")
            comparison.annotate(
                text, (position + offset, size / 1e9), (0, 3), textcoords="offset points", ha="center", fontsize=9
            )
    handles, labels = comparison.get_legend_handles_labels()
    comparison.legend(handles[:2], labels[:2], fontsize=8, loc="upper left")
    comparison.set_title("beside grouped-query attention", fontsize=11)
    for axes, room in ((components, 1.75), (comparison, 1.45)):
        axes.set_xticks(positions, [p.name for p in pairs])
        axes.set_ylabel("GB")
        axes.set_ylim(0, axes.dataLim.y1 * room)
        axes.grid(axis="y", alpha=0.25)
        axes.set_axisbelow(True)
    return figure


def run(options: argparse.Namespace) -> Result:
    pairs = []
    for name in options.preset:
        pairs.append(measure(name, options.tokens, options.gqa_tokens))
        print(f"{name}: done", file=sys.stderr, flush=True)
    text = tables(pairs)
    error = 100 * largest_error(pairs)
    if error > options.within:
        raise FiftyfoldError(f"a size is {error:.2f}% off its closed form, more than {options.within}%:\n\n{text}")
    return Result(text, draw(pairs), "Measured bytes by component, and beside grouped-query attention")


def main(arguments: list[str] | None = None) -> str:
    parser = make_parser(__doc__)
    parser.add_argument("--preset", nargs="+", choices=list(PRESETS), default=["v4-flash", "v4-pro"])
    parser.add_argument("--tokens", type=positive_int, default=1 << 20)
    parser.add_argument("--gqa-tokens", type=positive_int, default=1 << 14, help="length at which GQA-8 is measured")
    parser.add_argument("--within", type=float, default=1.0, help="allowed error in percent")
    return run_benchmark(parser, run, arguments)


if __name__ == "__main__":
    run_main(main)
