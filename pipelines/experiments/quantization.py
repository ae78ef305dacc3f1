"""Networks trained with and without quantization, scored in four ways."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from model import checkpoint
from model.atomic_files import write_text
from model.config import CACHE_FORMATS, ModelConfig
from model.transformer import Transformer
from pipelines.data.batches import Batch
from pipelines.experiments.trials import FINAL, QUANTIZATION, Trial
from pipelines.recipe.schema import Recipe
from pipelines.training.curriculum import curriculum
from pipelines.training.validation import held_out_batches, validate

METRICS = ("loss", "text_loss", "recall", "needle_recall", "recall_at_k", "recall_at_k_of_best")


@dataclass(frozen=True)
class Variant:
    """A way to score a pair of networks."""

    name: str
    trained_with_qat: bool
    """True to score the network trained with QAT, False to score the other one of a pair."""
    configure: Callable[[ModelConfig], ModelConfig]
    """Maps the network's configuration to the one to score it in."""


VARIANTS = (
    Variant(
        "without QAT, not quantized",
        False,
        lambda c: c.replace(**dict.fromkeys(CACHE_FORMATS, "fp32"), qat=False),
    ),
    Variant("without QAT, quantized after", False, lambda c: c.replace(qat=True)),
    Variant("with QAT, quantized", True, lambda c: c),
    Variant("with QAT, BF16 index keys", True, lambda c: c.replace(index_format="bf16")),
)


def score_variants(
    recipe: Recipe, with_qat: Sequence[Trial], without: Sequence[Trial]
) -> dict[str, dict[str, list[float]]]:
    """Score pairs of trained networks on the held-out rows; return {variant: {metric: one value per pair}}.

    Scores are stored in the trials' folders and reused.
    """
    found, batches = {}, held_out_batches(recipe)
    for variant in VARIANTS:
        each = [
            _score(recipe, batches, trial, variant) for trial in (with_qat if variant.trained_with_qat else without)
        ]
        found[variant.name] = {name: [scores[name] for scores in each] for name in METRICS if name in each[0]}
    return found


def _score(recipe: Recipe, batches: dict[str, list[Batch]], trial: Trial, variant: Variant) -> dict[str, float]:
    """Return the stored scores of a variant of a trial's network, or compute and store them."""
    path = trial.folder / QUANTIZATION
    stored = json.loads(path.read_text()) if path.exists() else {}
    if variant.name not in stored:
        model = Transformer(variant.configure(checkpoint.load_config(trial.folder / FINAL)))
        checkpoint.load_weights(model, trial.folder / FINAL)
        metrics = validate(model.eval(), batches, curriculum(recipe)[-1].attends)
        stored[variant.name] = {name.removeprefix("validation/"): value for name, value in metrics.items()}
        write_text(path, json.dumps(stored) + "\n")
    return stored[variant.name]
