"""Compare quantization-aware training with post-training quantization.

Every pair of checkpoints, one trained with ``model.qat`` and one without, is scored on the held-out rows in four
variants. The scores, with means and spreads over pairs, go to an MLflow run of their own.
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
from pipelines.data.batches import Batch
from pipelines.data.check import check_prepared
from pipelines.data.manifest import read_manifest
from pipelines.recipe.schema import Recipe
from pipelines.reports.terminal import print_table
from pipelines.steps import Step
from pipelines.tracking.lineage import dataset_input
from pipelines.tracking.mlflow_store import TrackedRun, open_tracking
from pipelines.tracking.system_metrics import system_metrics
from pipelines.training import compute_dtype
from pipelines.training.validation import held_out_batches, validate

METRICS = ("text_loss", "recall", "needle_recall", "recall_at_k", "recall_at_k_of_best")


@dataclass(frozen=True)
class Variant:
    """A way to score a pair of checkpoints."""

    name: str
    key: str
    """Part of the MLflow metric names. Spelled as in existing runs."""
    trained_with_qat: bool
    """True to score the checkpoint trained with QAT, False to score the other one of a pair."""
    configure: Callable[[ModelConfig], ModelConfig]
    """Maps the checkpoint's configuration to the one to score it in."""


VARIANTS = (
    Variant(
        "without QAT, not quantized",
        "without_QAT_not_quantised",
        False,
        lambda c: c.replace(**dict.fromkeys(CACHE_FORMATS, "fp32"), qat=False),
    ),
    Variant("without QAT, quantized after", "without_QAT_quantised_after", False, lambda c: c.replace(qat=True)),
    Variant("with QAT, quantized", "with_QAT_quantised", True, lambda c: c),
    Variant("with QAT, BF16 index keys", "with_QAT_BF16_index_keys", True, lambda c: c.replace(index_format="bf16")),
)


def run(recipe: Recipe) -> dict[str, dict[str, list[float]]]:
    """Score ``compare.qat`` and ``compare.plain``; return {variant: {metric: one value per pair}}.

    Raises ConfigError before any compute if checkpoints do not form pairs or their vocabulary is not that of the data.
    """
    section = recipe.compare
    if not section.qat or len(section.qat) != len(section.plain):
        raise ConfigError(
            f"compare: needs as many checkpoints trained with QAT as without, found {len(section.qat)} in compare.qat "
            f"and {len(section.plain)} in compare.plain"
        )
    manifest = read_manifest(recipe.data_folder, verify=True)
    recipe = check_prepared(recipe, manifest)
    for with_qat, without in zip(section.qat, section.plain):
        _check_pair(with_qat, without)
        vocab_size = checkpoint.load_config(with_qat).vocab_size
        if vocab_size != recipe.model.vocab_size:
            raise ConfigError(
                f"compare.qat: {with_qat} has a vocabulary of {vocab_size}, {recipe.data_folder} was prepared for "
                f"{recipe.model.vocab_size}"
            )
    tracked = open_tracking(recipe).start_run(recipe.run.name, kind="compare", recipe=recipe)
    with tracked, system_metrics(tracked, recipe.tracking.system_metrics_interval):
        tracked.log_dataset(dataset_input(recipe.data_folder, manifest, "evaluation"))
        batches = held_out_batches(recipe)
        scores: dict[str, dict[str, list[float]]] = {}
        for variant in VARIANTS:
            folders = section.qat if variant.trained_with_qat else section.plain
            each = [_score(folder, variant, batches) for folder in folders]
            scores[variant.name] = {name: [metrics[name] for metrics in each] for name in METRICS if name in each[0]}
        _log_scores(tracked, len(section.qat), scores)
    return scores


def _check_pair(with_qat: Path, without: Path) -> None:
    one, other = checkpoint.load_config(with_qat), checkpoint.load_config(without)
    for folder, config, key, expected in ((with_qat, one, "qat", True), (without, other, "plain", False)):
        if config.qat != expected:
            raise ConfigError(f"compare.{key}: {folder} was trained {'with' if config.qat else 'without'} QAT")
    if one.replace(qat=False) != other:
        raise ConfigError(f"compare: {with_qat} and {without} are networks of different configurations")
    if compute_dtype.read(with_qat) != compute_dtype.read(without):
        raise ConfigError(f"compare: {with_qat} and {without} were trained with products of different data types")


def _score(folder: Path, variant: Variant, batches: dict[str, list[Batch]]) -> dict[str, float]:
    model = Transformer(variant.configure(checkpoint.load_config(folder)))
    checkpoint.load_weights(model, folder)
    metrics = validate(model.eval(), batches, "sparse")
    return {name.removeprefix("validation/"): value for name, value in metrics.items()}


def _log_scores(tracked: TrackedRun, pairs: int, scores: dict[str, dict[str, list[float]]]) -> None:
    names = [name for name in METRICS if any(name in metrics for metrics in scores.values())]
    rows = [[variant, *(_with_spread(metrics.get(name)) for name in names)] for variant, metrics in scores.items()]
    for variant in VARIANTS:
        for name, values in scores[variant.name].items():
            tracked.log_metrics({f"compare/{variant.key}/{name}": statistics.fmean(values)})
            if len(values) > 1:
                tracked.log_metrics({f"compare/{variant.key}/{name}_spread": statistics.stdev(values)})
    tracked.log_table(dict(zip(["variant", *names], zip(*rows))), "compare/qat.json")
    title = f"QAT against quantization after training, {pairs} pair{'s' * (pairs > 1)}, mean ± standard deviation"
    print_table(title, ["variant", *names], rows)
    print(f"scores: {tracked.url_hint()}", flush=True)


def _with_spread(values: list[float] | None) -> str:
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4f}{spread}"


STEP = Step(run)
