"""What a model costs: cache bytes, FLOPs and parameters, beside its references and without each of the five choices."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from model.budget import FP8_EQUIVALENT, PARAMETER_RULE, WEIGHTING, ParameterCount, count_parameters
from model.checkpoint import load_config
from model.comparison import (
    Account,
    Choice,
    Regime,
    Step,
    account_of,
    choices,
    gqa8_account,
    regimes,
    times,
    v32_account,
    waterfall,
)
from model.config import ModelConfig
from model.errors import ConfigError
from model.files import atomic_file
from model.hf import CONFIG, is_pretrained
from model.hf_config import read_config
from model.muon import rule_for
from model.presets import PRESETS
from model.shards import read_json
from model.transformer import Transformer
from pipelines.recipe.schema import Recipe, load_recipe, with_overrides
from pipelines.reports.cache_measurement import MEASUREMENT_RULE, Measurement, measure_cache
from pipelines.reports.figures import FIGURE_SUFFIXES, budget_figure
from pipelines.reports.terminal import print_table

CURVE_TOKENS = (1 << 10, 1 << 22)
"""First and last length of the curves."""
_POINTS_PER_DOUBLING = 8


@dataclass(frozen=True)
class Budget:
    """Everything the step prints, as numbers; :meth:`to_dict` gives it as plain values."""

    config: ModelConfig
    context: int
    parameters: ParameterCount
    own: Account
    references: tuple[Account, ...]
    choices: tuple[Choice, ...]
    waterfall: tuple[Step, ...]
    regimes: tuple[Regime, ...]
    measurement: Measurement | None = None
    """Of the model's own cache at ``context`` tokens, where it was asked for."""

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON; ratios are null where the model's own cost is zero. Every figure's rule stands beside it."""
        parameters = {
            "rule": PARAMETER_RULE,
            "total": self.parameters.total,
            "active": self.parameters.active,
            "multi_token_module": self.parameters.mtp,
            "components": {
                name: {"total": total, "active": active} for name, (total, active) in self.parameters.components.items()
            },
        }
        without = [
            {
                "choice": choice.name,
                "taken_away": choice.taken_away,
                "used": choice.used,
                **self._costs(choice.account),
                "changes": [dataclasses.asdict(change) for change in choice.changes],
            }
            for choice in self.choices
        ]
        return {
            "model": {"name": self.own.name, "config": self.config.to_dict()},
            "context": self.context,
            "weighting": {"rule": WEIGHTING, "fp8_equivalent": FP8_EQUIVALENT},
            "parameters": parameters,
            "own": self._costs(self.own),
            "references": [self._costs(account) for account in self.references],
            "without": without,
            "waterfall": [dataclasses.asdict(step) for step in self.waterfall],
            "regimes": [dataclasses.asdict(regime) for regime in self.regimes],
            "measured": None if self.measurement is None else self.measurement.to_dict(),
        }

    def _costs(self, account: Account) -> dict[str, Any]:
        work, n = account.work(self.context), self.context
        return {
            "name": account.name,
            "rule": account.rule,
            "cache_bytes_per_token": account.bytes_per_token,
            "cache_bytes_per_token_by_component": account.per_token,
            "fixed_state_bytes": account.fixed,
            "cache_bytes": account.cache_bytes(n),
            "decode_flops": account.flops(n),
            "decode_fp8_equivalent": account.equivalent(n),
            "decode_work": [{**dataclasses.asdict(part), "fp8_equivalent": part.equivalent} for part in work],
            "times_own": {
                "cache_bytes_per_token": times(account.bytes_per_token, self.own.bytes_per_token),
                "cache_bytes": times(account.cache_bytes(n), self.own.cache_bytes(n)),
                "decode_flops": times(account.flops(n), self.own.flops(n)),
                "decode_fp8_equivalent": times(account.equivalent(n), self.own.equivalent(n)),
            },
        }


def budget_of(config: ModelConfig, context: int, name: str = "model", muon: bool = True) -> Budget:
    """The budget of ``config`` at ``context`` tokens; ``muon``: whether its recipe trains with Muon.

    The network is built on the meta device, where tensors have shapes and no memory.
    """
    with torch.device("meta"):
        model = Transformer(config)
    moved = sum(p.numel() for n, p in model.named_parameters() if rule_for(n, p, "muon") == "muon")
    parameters = count_parameters(model)
    references = (v32_account(), gqa8_account(config))
    return Budget(
        config,
        context,
        parameters,
        account_of(config, name),
        references,
        choices(config, parameters, moved, muon),
        waterfall(config, muon),
        regimes(config, references),
    )


# --- command line


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        metavar="NAME",
        help=f"{', '.join(PRESETS)}, depth:N, a recipe file or a checkpoint folder; without it, the recipe's model",
    )
    parser.add_argument("--context", metavar="N", help="tokens in the sequence; without it, all the model's positions")
    parser.add_argument(
        "--measure", action="store_true", help="allocate and fill a cache of that many tokens and measure its bytes"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument(
        "--figure", metavar="FILE", type=Path, help=f"draw the curves into FILE ({', '.join(FIGURE_SUFFIXES)})"
    )


def load(options: argparse.Namespace, files: Sequence[str], overrides: Sequence[str]) -> Recipe:
    """The recipe whose model is asked about: ``--model`` with overrides, or files with overrides. Raises ConfigError or
    CheckpointError."""
    if options.model is None:
        return load_recipe(files, overrides)
    if Path(options.model).is_file() and not files and _is_recipe(options.model):
        return load_recipe([options.model], overrides)
    if files:
        raise ConfigError("--model: names a model beside --config, which names one already; give one of the two")
    changes = {}
    for item in overrides:
        key, _, value = item.partition("=")
        try:
            changes[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ConfigError(f"command line: {key}: '{value}' is not a valid value") from None
    if {"model.preset", "model.depth"} & set(changes):
        raise ConfigError(f"command line: --model {options.model} is a starting point already, give no second one")
    recipe = load_recipe([]).model_copy(update={"model": find_model(options.model)})
    return with_overrides(recipe, changes)


def _is_recipe(path: str) -> bool:
    """Whether a YAML file has a recipe's sections, rather than the fields of a model alone."""
    try:
        content = yaml.safe_load(Path(path).read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return False  # which find_model says more about
    return isinstance(content, dict) and isinstance(content.get("model"), dict)


def find_model(name: str) -> ModelConfig:
    """The configuration that ``name`` stands for: a preset, ``depth:N``, a YAML file or a checkpoint folder."""
    if name in PRESETS:
        return ModelConfig.from_preset(name)
    if name.startswith("depth:"):
        depth = name.removeprefix("depth:")
        return ModelConfig.from_depth(int(depth) if depth.isdecimal() else depth)  # type: ignore[arg-type]
    if Path(name).is_dir():
        return (
            read_config(Path(name) / CONFIG, read_json(Path(name) / CONFIG))
            if is_pretrained(name)
            else load_config(name)
        )
    if Path(name).is_file():
        return ModelConfig.from_yaml(name)
    raise ConfigError(
        f"--model: '{name}' is no preset ({', '.join(PRESETS)}), no depth:N, no recipe file and no checkpoint folder"
    )


def run(recipe: Recipe, options: argparse.Namespace) -> Budget:
    """Print the budget as tables or as JSON, with a cache measured and a figure drawn where they are asked for.
    Raises ConfigError, or CacheError for a cache that is too large to measure."""
    config = recipe.model
    context = _context(options.context, config)
    if options.figure is not None:
        _check_figure(options.figure)
    name = Path(options.model).name if options.model else recipe.run.name
    budget = budget_of(config, context, name, muon=recipe.train.optimizer.rule == "muon")
    if options.measure:
        budget = dataclasses.replace(budget, measurement=measure_cache(config, context))
    if options.figure is not None:
        write_figure(budget, options.figure)
    if options.json:
        print(json.dumps(budget.to_dict(), indent=2))
    else:
        print_budget(budget)
        if options.figure is not None:
            print(f"figure: {options.figure}")
    return budget


def _context(text: str | None, config: ModelConfig) -> int:
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
    """Before anything is computed, so that a mistyped path costs nothing."""
    if path.suffix not in FIGURE_SUFFIXES:
        raise ConfigError(f"--figure: {path}: expected a name that ends in {', '.join(FIGURE_SUFFIXES)}")
    if path.is_dir():
        raise ConfigError(f"--figure: {path}: is a folder")
    if not path.parent.is_dir():
        raise ConfigError(f"--figure: {path}: no such folder as {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise ConfigError(f"--figure: {path}: {path.parent} cannot be written to")


# --- figure


def write_figure(budget: Budget, path: Path) -> None:
    """Draw the curves into ``path``, which appears whole or not at all."""
    figure = budget_figure(
        _lengths(), budget.own, budget.references, {regime.key: regime for regime in budget.regimes}, budget.config
    )
    with atomic_file(path) as scratch:
        figure.savefig(scratch, dpi=130, format=path.suffix[1:])


def _lengths() -> list[int]:
    first, last = CURVE_TOKENS
    points = int(math.log2(last // first)) * _POINTS_PER_DOUBLING
    return [round(first * 2 ** (i / _POINTS_PER_DOUBLING)) for i in range(points + 1)]


# --- tables


def print_budget(budget: Budget) -> None:
    config, own, n = budget.config, budget.own, budget.context
    schedule = ", ".join(f"{count} {name}" for name, count in Counter(config.layers).items())
    print(f"{own.name}: {config.num_layers} layers ({schedule}), hidden {config.hidden_size}, at {n:,} tokens\n")

    rows = [
        [name, f"{total:,}", f"{active:,}"]
        for name, (total, active) in sorted(budget.parameters.components.items(), key=lambda item: -item[1][0])
    ]
    rows.append(["total", f"{budget.parameters.total:,}", f"{budget.parameters.active:,}"])
    if budget.parameters.mtp:
        rows.append(["besides: multi-token module", f"{budget.parameters.mtp:,}", ""])
    print_table("parameters", ["component", "all", "active per token"], rows)
    _rules(PARAMETER_RULE)

    rows = [[part, _number(size), _bytes(size * n)] for part, size in own.per_token.items()]
    rows += [[f"{part} (fixed state)", "", _bytes(size)] for part, size in own.fixed.items()]
    rows.append(["total", _number(own.bytes_per_token), _bytes(own.cache_bytes(n))])
    print_table("cache of one sequence", ["component", "bytes per token", f"at {n:,} tokens"], rows)
    _rules(own.rule)
    if budget.measurement is not None:
        columns = ["component", "closed form, bytes", "measured", "difference"]
        print_table("cache, measured", columns, budget.measurement.rows())
        _rules(MEASUREMENT_RULE)

    rows = [[w.part, w.format, _giga(w.flops), _giga(w.equivalent)] for w in own.work(n)]
    rows.append(["total", "", _giga(own.flops(n)), _giga(own.equivalent(n))])
    print_table("decoding one token", ["part", "format", "GFLOP", "GFLOP, FP8 equivalents"], rows)
    _rules(f"a multiply-add is 2 FLOPs; {WEIGHTING}")

    rows = [_beside(account.name, account, budget) for account in (own, *budget.references)]
    print_table("beside references; times: of the model's own", _BESIDE, rows)
    _rules(*(f"{account.name}: {account.rule}" for account in budget.references))

    rows = [_beside(own.name, own, budget)]
    for choice in budget.choices:
        rows.append(_beside(f"without {choice.name}" + ("" if choice.used else " (not used)"), choice.account, budget))
    print_table("each choice taken away; times: of the model's own", _BESIDE, rows)
    _rules(*(f"{choice.name}: becomes {choice.taken_away}" for choice in budget.choices if choice.used))

    changes = [(choice, change) for choice in budget.choices for change in choice.changes]
    if changes:
        rows = [
            [f"{choice.name}: {change.what}", *map(_number, (change.with_choice, change.without)), change.unit]
            for choice, change in changes
        ]
        print_table("what else a choice changes", ["choice", "with it", "without it", "unit"], rows)
        _rules(*(f"{change.what}: {change.rule}" for _, change in changes))

    rows = [
        [f"{step.name}: {step.rule}", _number(step.bytes_per_token), "" if i == 0 else _times(step.factor)]
        for i, step in enumerate(budget.waterfall)
    ]
    whole = times(budget.waterfall[0].bytes_per_token, own.bytes_per_token)
    rows.append(["all factors multiplied", _number(own.bytes_per_token), _times(whole)])
    print_table("from GQA-8 in BF16 to this cache", ["stage", "bytes per token", "times smaller"], rows)
    _rules("growing cache bytes per token, fixed state left out; a factor below 1 is a price paid")

    rows = [[r.name, _tokens(r.tokens), _tokens(r.tokens_equivalent)] for r in budget.regimes]
    print_table("where the regimes part", ["from this length on", "tokens", "tokens, FP8 equivalents"], rows)
    _rules(*dict.fromkeys(f"{regime.name}: {regime.rule}" for regime in budget.regimes))


_BESIDE = ["network", "bytes per token", "times", "whole cache", "times", "GFLOP", "times", "FP8 equivalents", "times"]


def _beside(name: str, account: Account, budget: Budget) -> list[str]:
    own, n = budget.own, budget.context
    return [
        name,
        _number(account.bytes_per_token),
        _times(times(account.bytes_per_token, own.bytes_per_token)),
        _bytes(account.cache_bytes(n)),
        _times(times(account.cache_bytes(n), own.cache_bytes(n))),
        _giga(account.flops(n)),
        _times(times(account.flops(n), own.flops(n))),
        _giga(account.equivalent(n)),
        _times(times(account.equivalent(n), own.equivalent(n))),
    ]


def _rules(*rules: str) -> None:
    for rule in rules:
        print(f"  {rule}")
    print()


def _number(x: float) -> str:
    return f"{x:,.4f}".rstrip("0").rstrip(".")


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"


def _giga(flops: float) -> str:
    return f"{flops / 1e9:,.3f}" if flops >= 1e6 else f"{flops / 1e9:.6f}"


def _tokens(tokens: int | None) -> str:
    return "never" if tokens is None else f"{tokens:,}"


def _bytes(size: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:,.2f} {unit}"
    return f"{size:,.0f} B"
