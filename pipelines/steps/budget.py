"""Print a model's cache bytes, FLOPs and parameters, beside its references and without each of the five choices."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from matplotlib.figure import Figure

from model.checkpoint import load_config
from model.config import ModelConfig
from model.costs import COMPARED, SSA_DENSITY
from model.errors import ConfigError
from model.hf import is_pretrained, read_pretrained_config
from model.presets import PRESETS
from model.wording import quote
from pipelines.recipe.loading import load_recipe, read_yaml, with_overrides
from pipelines.recipe.messages import naming
from pipelines.recipe.overrides import parse_override
from pipelines.recipe.paths import check_creatable, path_option
from pipelines.recipe.schema import Recipe
from pipelines.recipe.section import check_distinct
from pipelines.reports.budget import Budget, budget_of
from pipelines.reports.budget_figures import budget_figure
from pipelines.reports.budget_tables import print_budget
from pipelines.reports.cache_measurement import measure_cache
from pipelines.reports.family_comparison import Comparison, compare, draw_comparison, print_comparison
from pipelines.reports.figures import FIGURE_SUFFIXES, curve_lengths, save_figure
from pipelines.steps import Step

CURVE_TOKENS = (1 << 10, 1 << 22)
"""First and last sequence length of the curves."""
_POINTS_PER_DOUBLING = 8
_Result = TypeVar("_Result", Budget, Comparison)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the step."""
    parser.add_argument(
        "--model",
        metavar="NAME",
        help=f"{', '.join(PRESETS)}, depth:N, a recipe file or a checkpoint folder; default: the recipe's model",
    )
    parser.add_argument("--context", metavar="N", help="tokens in the sequence; default: the model's maximum")
    parser.add_argument(
        "--measure", action="store_true", help="allocate and fill a cache of that length and measure its bytes"
    )
    parser.add_argument("--json", dest="as_json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument(
        "--figure",
        metavar="FILE",
        type=path_option("--figure"),
        help=f"draw the curves to FILE ({', '.join(FIGURE_SUFFIXES)})",
    )
    parser.add_argument(
        "--against",
        metavar="FAMILY,...",
        help=f"compare with families ({', '.join(COMPARED)}) at the model's width, layers and heads instead",
    )
    parser.add_argument(
        "--ssa-density",
        metavar="SHARE",
        help="with --against: assumed core attention of SSA as a share of dense attention; default 1/64.5",
    )


def load(options: argparse.Namespace, files: Sequence[Path], overrides: Sequence[str]) -> Recipe:
    """Return the recipe with the model: that of ``--model`` or of the files, with overrides.

    Raises ConfigError or CheckpointError.
    """
    if options.model is None:
        return load_recipe(files, overrides)
    if files:
        raise ConfigError("--model: names a model beside --config, which already names one; give one of the two")
    path = None if _is_named(options.model) else path_option("--model")(options.model)
    if path is not None and path.is_file() and isinstance(read_yaml(path).get("model"), dict):
        return load_recipe([path], overrides)  # a recipe, rather than the fields of a model
    changes = dict(map(parse_override, overrides))
    scales = options.model.startswith("depth:")
    if {"model.preset", "model.depth", *(["model.family"] if not scales else [])} & set(changes):
        raise ConfigError(f"command line: --model {options.model} is already a starting point, give no second one")
    family = changes.pop("model.family", "v4")
    if path is None:
        model = _named_model(options.model, family)
    else:
        with naming("--model"):
            model = _read_model(path)
    return with_overrides(load_recipe([]).model_copy(update={"model": model}), changes)


def _is_named(name: str) -> bool:
    return name in PRESETS or name.startswith("depth:")


def _named_model(name: str, family: Any) -> ModelConfig:
    """Return the configuration of a preset, or of ``depth:N`` in a family. Raises ConfigError."""
    if name in PRESETS:
        return ModelConfig.from_preset(name)
    depth = name.removeprefix("depth:")
    is_number = depth.isdecimal() and len(depth) < 10
    try:
        return ModelConfig.from_depth(int(depth) if is_number else depth, family)  # type: ignore[arg-type]
    except ConfigError as error:
        raise ConfigError(f"model.{error}") from None


def _read_model(path: Path) -> ModelConfig:
    """Return the configuration in a checkpoint folder or in a YAML file of fields."""
    if path.is_dir():
        return read_pretrained_config(path) if is_pretrained(path) else load_config(path)
    if path.is_file():
        content = read_yaml(path)
        if "model" in content:
            raise ConfigError(f"{path}: model: expected a mapping, found {quote(content['model'])}")
        try:
            return ModelConfig.from_dict(content)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
    raise ConfigError(
        f"'{path}' is no preset ({', '.join(PRESETS)}), no depth:N, no recipe file and no checkpoint folder"
    )


def run(
    recipe: Recipe,
    model: str | None = None,
    context: str | None = None,
    measure: bool = False,
    as_json: bool = False,
    figure: Path | None = None,
    against: str | None = None,
    ssa_density: str | None = None,
) -> Budget | Comparison:
    """Print the budget, or the comparison with ``against``, as tables or JSON; measure caches and draw a figure if
    asked to.

    Raises ConfigError, or CacheError for a cache too large to measure.
    """
    config = recipe.model
    tokens = _parse_context(context, config)
    if figure is not None:
        _check_figure(figure)
    name = Path(model).name if model else recipe.run.name
    if against is not None:
        density = _parse_density(ssa_density)
        comparison = compare(config, name, _parse_families(against), tokens, density, measure)
        _report(comparison, as_json, print_comparison, figure, draw_comparison)
        return comparison
    if ssa_density is not None:
        raise ConfigError("--ssa-density: changes nothing without --against")
    budget = budget_of(config, tokens, name, muon=recipe.train.optimizer.rule == "muon")
    if measure:
        budget = dataclasses.replace(budget, measurement=measure_cache(config, tokens))
    _report(budget, as_json, print_budget, figure, _draw_budget)
    return budget


def _report(
    result: _Result,
    as_json: bool,
    show: Callable[[_Result], None],
    figure: Path | None,
    draw: Callable[[_Result], Figure],
) -> None:
    """Draw the figure to ``figure`` atomically, if given, and print the result."""
    if figure is not None:
        save_figure(draw(result), figure)
    if as_json:
        print(json.dumps(result.to_dict(), indent=2))
        return
    show(result)
    if figure is not None:
        print(f"figure: {figure}")


def _parse_families(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in COMPARED:
            always = "; SSA is in every comparison" if name.lower() == "ssa" else ""
            raise ConfigError(f"--against: '{name}' is not one of {', '.join(COMPARED)}{always}")
    try:
        return check_distinct(names)
    except ValueError as error:
        raise ConfigError(f"--against: {error}") from None


def _parse_density(text: str | None) -> float:
    if text is None:
        return SSA_DENSITY
    try:
        density = float(text)
    except ValueError:
        density = math.nan
    if not 0 < density <= 1:
        raise ConfigError(f"--ssa-density: expected a number above 0 and at most 1, found '{text}'")
    return density


def _parse_context(text: str | None, config: ModelConfig) -> int:
    if text is None:
        return config.max_positions
    try:
        tokens = int(text)
    except ValueError:
        raise ConfigError(f"--context: expected a whole number of tokens, found '{text}'") from None
    if tokens < 1:
        raise ConfigError(f"--context: must be at least 1 token, found {tokens}")
    if tokens > config.max_positions:
        raise ConfigError(f"--context: {tokens} tokens exceed the model's max_positions of {config.max_positions}")
    return tokens


def _check_figure(path: Path) -> None:
    """Raise ConfigError for a path that cannot be written, before anything is computed."""
    if path.suffix not in FIGURE_SUFFIXES:
        raise ConfigError(f"--figure: {path}: expected a name that ends in {', '.join(FIGURE_SUFFIXES)}")
    if path.is_dir():
        raise ConfigError(f"--figure: {path}: is a folder")
    if not path.parent.is_dir():
        raise ConfigError(f"--figure: {path}: no such folder as {path.parent}")
    check_creatable(path, "--figure")


# --- figure


def _draw_budget(budget: Budget) -> Figure:
    crossings = {regime.key: regime for regime in budget.crossovers}
    lengths = curve_lengths(*CURVE_TOKENS, _POINTS_PER_DOUBLING)
    return budget_figure(lengths, budget.own, budget.references, crossings, budget.config)


STEP = Step(run, add_options, load)
