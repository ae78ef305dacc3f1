"""The compare step: what quantisation in the training loop buys over quantising after the fact.

Every pair of checkpoints, one trained with ``model.qat`` and one without, is scored on the held-out rows in four ways.
The scores, means and spreads over pairs, go to a run of their own.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from model import checkpoint
from model.config import CACHE_FORMATS, ModelConfig
from model.errors import ConfigError
from model.transformer import Transformer
from pipelines.data.check import fit_to_data
from pipelines.data.packing import Batch, read_manifest
from pipelines.recipe.schema import Recipe
from pipelines.reports.terminal import print_table
from pipelines.tracking.mlflow_store import open_tracking
from pipelines.training import compute_dtype
from pipelines.training.trainer import held_out
from pipelines.training.validation import validate

METRICS = ("text_loss", "recall", "needle_recall", "recall_at_k", "recall_at_k_of_best")


@dataclass(frozen=True)
class Way:
    name: str
    trained_with_qat: bool
    stored: Callable[[ModelConfig], ModelConfig]
    """The configuration that a checkpoint is scored in."""


WAYS = (
    Way("without QAT, not quantised", False, lambda c: c.replace(**dict.fromkeys(CACHE_FORMATS, "fp32"), qat=False)),
    Way("without QAT, quantised after", False, lambda c: c.replace(qat=True)),
    Way("with QAT, quantised", True, lambda c: c),
    Way("with QAT, BF16 index keys", True, lambda c: c.replace(index_format="bf16")),
)


def run(recipe: Recipe) -> dict[str, dict[str, list[float]]]:
    """Score ``compare.qat`` and ``compare.plain``; returns {way: {metric: one value for each pair}}.

    Raises ConfigError before any compute for checkpoints that are no pairs, or of another vocabulary than the data.
    """
    section = recipe.compare
    if not section.qat or len(section.qat) != len(section.plain):
        raise ConfigError(
            f"compare: takes as many checkpoints trained with QAT as without, found {len(section.qat)} in compare.qat "
            f"and {len(section.plain)} in compare.plain"
        )
    recipe = fit_to_data(recipe, read_manifest(recipe.data_folder, verify=True))
    for with_qat, without in zip(section.qat, section.plain):
        _check_pair(with_qat, without)
        found_size = checkpoint.load_config(with_qat).vocab_size
        if found_size != recipe.model.vocab_size:
            raise ConfigError(
                f"compare.qat: {with_qat} has a vocabulary of {found_size}, {recipe.data_folder} was prepared for "
                f"{recipe.model.vocab_size}"
            )
    batches = held_out(recipe)
    found: dict[str, dict[str, list[float]]] = {}
    for way in WAYS:
        folders = section.qat if way.trained_with_qat else section.plain
        each = [_score(folder, way, batches) for folder in folders]
        found[way.name] = {name: [scores[name] for scores in each] for name in METRICS if name in each[0]}
    _log(recipe, found)
    return found


def _check_pair(with_qat: Path, without: Path) -> None:
    one, other = checkpoint.load_config(with_qat), checkpoint.load_config(without)
    for folder, config, key, expected in ((with_qat, one, "qat", True), (without, other, "plain", False)):
        if config.qat != expected:
            raise ConfigError(f"compare.{key}: {folder} was trained {'with' if config.qat else 'without'} QAT")
    if one.replace(qat=False) != other:
        raise ConfigError(f"compare: {with_qat} and {without} are networks of different configurations")
    if compute_dtype.read(with_qat) != compute_dtype.read(without):
        raise ConfigError(f"compare: {with_qat} and {without} were trained with products of different data types")


def _score(folder: Path, way: Way, batches: dict[str, list[Batch]]) -> dict[str, float]:
    model = Transformer(way.stored(checkpoint.load_config(folder)))
    checkpoint.load_weights(model, folder)
    metrics = validate(model.eval(), batches, "sparse")
    return {name.removeprefix("validation/"): value for name, value in metrics.items()}


def _log(recipe: Recipe, found: dict[str, dict[str, list[float]]]) -> None:
    pairs = len(recipe.compare.qat)
    names = [name for name in METRICS if any(name in scores for scores in found.values())]
    rows = [[way, *(_with_spread(scores.get(name)) for name in names)] for way, scores in found.items()]
    tracked = open_tracking(recipe).start_run(recipe.run.name, kind="compare", recipe=recipe)
    with tracked:
        for way, scores in found.items():
            key = way.replace(",", "").replace(" ", "_")
            for name, values in scores.items():
                tracked.log_metrics({f"compare/{key}/{name}": statistics.fmean(values)})
                if len(values) > 1:
                    tracked.log_metrics({f"compare/{key}/{name}_spread": statistics.stdev(values)})
        tracked.log_table(dict(zip(["way", *names], zip(*rows))), "compare/qat.json")
    title = f"QAT against quantising after the fact, {pairs} pair{'s' * (pairs > 1)}, mean ± standard deviation"
    print_table(title, ["way", *names], rows)
    print(f"scores: {tracked.url_hint()}", flush=True)


def _with_spread(values: list[float] | None) -> str:
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4f}{spread}"
