"""Scores of checkpoints on the tasks of the evaluate section."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from evals.documents import TASKS, task_class
from model import checkpoint
from model.errors import ConfigError
from model.tokenizer import load_tokenizer
from model.transformer import Transformer
from pipelines.data.retrieval_rows import name_setting
from pipelines.recipe.schema import Recipe


def score_tasks(
    network: Path,
    recipe: Recipe,
    tasks: Sequence[str] | None = None,
    lengths: Sequence[int] | None = None,
) -> dict[str, float]:
    """Return the metrics of :func:`evals.run.evaluate` for a checkpoint, by default with the evaluate section's values.

    Text comes from the recipe's prepared data or, if there is none, from the standard library. Raises ConfigError,
    naming the recipe's key, CheckpointError or DataError.
    """
    from evals.run import evaluate  # importing lm-eval takes longer than a short training

    tasks = recipe.evaluate.tasks if tasks is None else tasks
    lengths = recipe.evaluate.lengths if lengths is None else lengths
    with _named_keys():
        return evaluate(network, **_documents(recipe, tasks, lengths), device="cuda" if recipe.train.use_gpu else "cpu")


def check_section(recipe: Recipe) -> None:
    """Raise ConfigError for tasks, lengths, depths and task settings that no network could be scored with."""
    from evals.run import check_settings

    section = recipe.evaluate
    try:
        check_settings(section.tasks, section.lengths, section.depths)
    except ConfigError as error:
        raise ConfigError(f"evaluate.{error}") from None
    settings = {task: recipe.data.settings_of(task) for task in section.tasks}
    try:
        check_settings(section.tasks, section.lengths, section.depths, settings)
    except ConfigError as error:
        raise name_setting(error) from None


def check_tasks(recipe: Recipe, network: Path | None = None) -> None:
    """Generate as few documents of every task as possible, for a checkpoint or, before any training, for the recipe's
    model.

    Raises ConfigError for a task that the model cannot hold, or that proves nothing.
    """
    from evals.run import generate

    documents = _documents(recipe, recipe.evaluate.tasks, recipe.evaluate.lengths)
    documents["samples"] = min(fewest_samples(recipe), recipe.evaluate.samples)
    with tempfile.TemporaryDirectory() as scratch, _named_keys():
        if network is None:
            network = Path(scratch) / "untrained"
            checkpoint.save(Transformer(recipe.model), network, load_tokenizer(recipe.data_folder))
        generate(network, **documents)


def fewest_samples(recipe: Recipe) -> int:
    """Return the number of documents that every task of the evaluate section accepts. Raises ConfigError."""
    names = recipe.evaluate.tasks
    with _named_keys():
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


@contextmanager
def _named_keys() -> Iterator[None]:
    """Put the recipe's key before errors of tasks, which name one length or depth without the section."""
    try:
        yield
    except ConfigError as error:
        named = re.match(r"(?:(\w+): )?(tasks|lengths?|depths?|samples|distance)\b", str(error))
        if named is not None:
            key = {"length": "lengths", "depth": "depths"}.get(named[2], named[2])
            reason = str(error) if named[1] else str(error)[named.end() :].lstrip(": ")
            raise ConfigError(f"evaluate.{key}: {reason}") from error
        if str(error).partition(":")[0] in TASKS:
            raise name_setting(error) from error
        raise
