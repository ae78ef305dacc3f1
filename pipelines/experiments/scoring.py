"""Scores of checkpoints on the tasks of the evaluate section."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from evals.documents import task_class
from model import checkpoint
from model.errors import ConfigError
from model.tokenizer import load_tokenizer
from model.transformer import Transformer
from pipelines.recipe.schema import Recipe


def score_tasks(
    network: Path,
    recipe: Recipe,
    tasks: Sequence[str] | None = None,
    lengths: Sequence[int] | None = None,
    samples: int | None = None,
) -> dict[str, float]:
    """Return the metrics of :func:`evals.run.evaluate` for a checkpoint, by default with the evaluate section's values.

    Text comes from the recipe's prepared data or, if there is none, from the standard library. Raises ConfigError,
    naming the recipe's key, CheckpointError or DataError.
    """
    from evals.run import evaluate  # importing lm-eval takes longer than a short training

    section = recipe.evaluate
    tasks = section.tasks if tasks is None else tasks
    try:
        return evaluate(
            network,
            tasks,
            section.lengths if lengths is None else lengths,
            section.depths,
            section.samples if samples is None else samples,
            section.seed,
            recipe.data_folder if recipe.data_folder.is_dir() else None,
            {task: recipe.data.settings_of(task) for task in tasks},
            section.distance,
            device="cuda" if recipe.train.use_gpu else "cpu",
        )
    except ConfigError as error:
        # Tasks know one length of evaluate.lengths, by their own name.
        raise ConfigError(re.sub("^length:", "evaluate.lengths:", str(error))) from error


def fewest_samples(recipe: Recipe) -> int:
    """Return the number of documents that every task of the evaluate section accepts. Raises ConfigError."""
    tasks = [task_class(name).create(recipe.data.settings_of(name), recipe.model) for name in recipe.evaluate.tasks]
    return max(task.fewest_samples for task in tasks)


def check_tasks(recipe: Recipe) -> None:
    """Score a network with random weights on as few samples as possible, before any training.

    Raises ConfigError for a task that the model cannot hold, or that is vacuous.
    """
    samples = min(fewest_samples(recipe), recipe.evaluate.samples)
    with tempfile.TemporaryDirectory() as scratch:
        network = Path(scratch) / "untrained"
        checkpoint.save(Transformer(recipe.model), network, load_tokenizer(recipe.data_folder))
        score_tasks(network, recipe, samples=samples)
