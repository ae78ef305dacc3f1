"""A model beside published families at its width, number of layers and number of heads."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from model.config import ModelConfig
from model.costs import WEIGHTING, CostModel, costs_of, family_config, family_costs, ssa_costs
from model.errors import CacheError
from model.wording import count
from pipelines.reports.budget_figures import comparison_figure
from pipelines.reports.cache_measurement import Measurement, check_memory, measure_cache
from pipelines.reports.figures import LENGTHS, binary, curve_lengths
from pipelines.reports.terminal import print_table

_POINTS_PER_DOUBLING = 4
_EXTRAPOLATED = " *"
"""Mark of lengths beyond the model's maximum positions."""


@dataclass(frozen=True)
class Comparison:
    """Costs of the model, of the families and of the assumption about SSA, in this order."""

    config: ModelConfig
    context: int
    networks: tuple[CostModel, ...]
    measurements: tuple[Measurement, ...] = ()
    """Measured caches at ``context`` tokens, in the order of ``networks``. The last network, the assumption, has none,
    because it is not implemented."""

    @property
    def measured(self) -> list[tuple[CostModel, Measurement]]:
        """Networks with a measured cache."""
        return list(zip(self.networks, self.measurements))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, each network with its rule."""
        return {
            "model": {"name": self.networks[0].name, "config": self.config.to_dict()},
            "weighting": WEIGHTING,
            "networks": [
                _network(network, measurement, self.config.max_positions)
                for network, measurement in itertools.zip_longest(self.networks, self.measurements)
            ],
        }


def _network(network: CostModel, measurement: Measurement | None, max_positions: int) -> dict[str, Any]:
    return {
        "name": network.name,
        "rule": network.rule,
        "cache_bytes_per_token": network.bytes_per_token,
        "fixed_state_bytes": sum(network.fixed.values()),
        "costs": [
            {
                "tokens": n,
                "extrapolated": n > max_positions,
                "cache_bytes": network.cache_bytes(n),
                "decode_flops": network.flops(n),
                "decode_fp8_equivalent": network.equivalent(n),
            }
            for n in LENGTHS
        ],
        "measured": None if measurement is None else measurement.to_dict(),
    }


def compare(
    config: ModelConfig, name: str, families: Sequence[str], context: int, density: float, measure: bool
) -> Comparison:
    """Return the costs of ``config`` beside ``families`` (:data:`model.costs.COMPARED`) and SSA at ``density``.

    Raises ConfigError for a family that does not fit the model's sizes, and CacheError, which names the network, for a
    cache too large to measure.
    """
    configs = [config, *(family_config(config, family) for family in families)]
    networks = [costs_of(config, name), *(family_costs(config, family) for family in families)]
    for network, each in zip(networks, configs) if measure else ():  # all of them, before any is allocated
        try:
            check_memory([each], context)
        except CacheError as error:
            raise CacheError(f"--measure: {network.name}: {error}; --context sets a shorter sequence") from error
    measurements = tuple(measure_cache(each, context) for each in configs) if measure else ()
    return Comparison(config, context, (*networks, ssa_costs(config, density)), measurements)


def print_comparison(comparison: Comparison) -> None:
    """Print a table per cost, followed by the rules of the networks."""
    c = comparison.config
    sizes = f"{count(c.num_layers, 'layer')}, hidden {c.hidden_size}, {count(c.num_heads, 'head')}"
    print(f"{sizes}, at most {c.max_positions:,} tokens\n")
    columns = ["network", *(f"{binary(n)}{_EXTRAPOLATED * (n > c.max_positions)}" for n in LENGTHS)]
    tables = (
        ("cache of one sequence, MB", CostModel.cache_bytes, 1e6),
        ("decoding one token, GFLOP", CostModel.flops, 1e9),
        ("decoding one token, GFLOP in FP8 equivalents", CostModel.equivalent, 1e9),
    )
    for title, cost, unit in tables:
        rows = [[each.name, *(_format(cost(each, n) / unit) for n in LENGTHS)] for each in comparison.networks]
        print_table(title, columns, rows)
        print()
    if c.max_positions < LENGTHS[-1]:
        print(f"  {_EXTRAPOLATED.strip()} extrapolation beyond the model's max_positions, {c.max_positions:,} tokens\n")
    if comparison.measurements:
        rows = [
            [each.name, f"{m.closed_form:,.0f}", f"{m.measured:,}", f"{m.measured / m.closed_form - 1:+.2%}"]
            for each, m in comparison.measured
        ]
        title = f"cache at {comparison.context:,} tokens, bytes"
        print_table(title, ["network", "closed form", "measured", "difference"], rows)
        print("  bytes of the storages, in whole pages, of a cache allocated and filled with random entries\n")
    for network in comparison.networks:
        print(f"  {network.name}: {network.rule}")
    print(f"  {WEIGHTING}")


def draw_comparison(comparison: Comparison) -> Figure:
    """Return the figure of a comparison from the first to the last of LENGTHS."""
    lengths = curve_lengths(LENGTHS[0], LENGTHS[-1], _POINTS_PER_DOUBLING)
    measured = [(found.tokens, found.measured) for found in comparison.measurements]
    networks, max_positions = comparison.networks, comparison.config.max_positions
    return comparison_figure(lengths, networks[:-1], networks[-1], measured, max_positions)


def _format(x: float) -> str:
    return f"{x:,.0f}" if x >= 1000 else f"{x:.4g}"
