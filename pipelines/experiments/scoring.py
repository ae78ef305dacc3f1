"""Scores of checkpoints on the tasks of the evaluate section."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evals.documents import task_class
from model import checkpoint
from model.tokenizer import load_tokenizer
from model.transformer import Transformer
from pipelines.data.retrieval_rows import setting_key
from pipelines.recipe.messages import naming
from pipelines.recipe.schema import EvaluateSection, Recipe


def score_tasks(
    network: Path,
    recipe: Recipe,
    tasks: Sequence[str] | None = None,
    lengths: Sequence[int] | None = None,
    checkpoint_key: str | None = None,
) -> dict[str, float]:
    """Return the metrics of :func:`evals.run.evaluate` for a checkpoint, by default with the evaluate section's values.

    Text comes from the recipe's prepared data or, if there is none, from the standard library. Raises ConfigError,
    CheckpointError or DataError. Errors name the recipe's key; errors about the checkpoint name ``checkpoint_key``.
    """
    from evals.run import evaluate  # importing lm-eval takes longer than a short training

    tasks = recipe.evaluate.tasks if tasks is None else tasks
    lengths = recipe.evaluate.lengths if lengths is None else lengths
    with naming(checkpoint_key, _argument_key):
        return evaluate(network, **_documents(recipe, tasks, lengths), device="cuda" if recipe.train.use_gpu else "cpu")


def check_section(recipe: Recipe) -> None:
    """Raise ConfigError for tasks, lengths, depths and task settings that no network could be scored with."""
    from evals.run import check_settings

    section = recipe.evaluate
    with naming(None, _argument_key):
        check_settings(section.tasks, section.lengths, section.depths)
    settings = {task: recipe.data.settings_of(task) for task in section.tasks}
    with naming(None, setting_key):
        check_settings(section.tasks, section.lengths, section.depths, settings)


def check_tasks(recipe: Recipe, network: Path | None = None, checkpoint_key: str | None = None) -> None:
    """Generate as few documents of every task as possible, for a checkpoint or, before any training, for the recipe's
    model.

    Raises ConfigError for a task that the model cannot hold, or that proves nothing.
    """
    from evals.run import generate

    documents = _documents(recipe, recipe.evaluate.tasks, recipe.evaluate.lengths)
    documents["samples"] = min(fewest_samples(recipe), recipe.evaluate.samples)
    with tempfile.TemporaryDirectory() as scratch, naming(checkpoint_key, _argument_key):
        if network is None:
            network = Path(scratch) / "untrained"
            checkpoint.save(Transformer(recipe.model), network, load_tokenizer(recipe.data_folder))
        generate(network, **documents)


def fewest_samples(recipe: Recipe) -> int:
    """Return the number of documents that every task of the evaluate section accepts. Raises ConfigError."""
    names = recipe.evaluate.tasks
    with naming(None, _argument_key):
        tasks = [task_class(name).create(recipe.data.settings_of(name), recipe.model) for name in names]
    return max(task.fewest_samples for task in tasks)


def _documents(recipe: Recipe, tasks: Sequence[str], lengths: Sequence[int]) -> dict[str, Any]:
    """Return the arguments of :func:`evals.run.generate` that describe the documents."""
    section = recipe.evaluate
    return {
        "tasks": tasks,
        "lengths": lengths,
        "depths": section.depths,
        "samples": section.samples,
        "seed": section.seed,
        "data_folder": recipe.prepared_data,
        "settings": {task: recipe.data.settings_of(task) for task in tasks},
        "distance": section.distance,
    }


def _argument_key(field: str) -> str | None:
    """Return the recipe's key of an argument of :func:`evals.run.evaluate`, or of a task's length, depth or setting.
    None for fields of the checkpoint's files."""
    task, _, name = field.rpartition(".")
    name = {"length": "lengths", "depth": "depths"}.get(name, name)
    if name in EvaluateSection.model_fields:
        return f"evaluate.{name}"
    return setting_key(field) if task else None
