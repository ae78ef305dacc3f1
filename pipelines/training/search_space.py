"""The search space of a sweep: combinations, trial recipes and their checks."""

from __future__ import annotations

import itertools
import random
from typing import Any

from model.errors import ConfigError
from pipelines.recipe.loading import with_overrides
from pipelines.recipe.schema import Recipe, Setting
from pipelines.training.validation import NAMES

_STAGE_SETTINGS = {
    "model.index_topk": "index_topk",
    "model.qat": "qat",
    "train.batch_rows": "batch_rows",
    "train.optimizer.indexer_learning_rate": "indexer_learning_rate",
}
"""Recipe keys that a stage may override, and the stage's field."""


def combinations(recipe: Recipe) -> list[dict[str, Setting]]:
    """Return the settings of each trial by dotted key: the whole grid, or ``sweep.trials`` random points of it."""
    space = recipe.sweep.space
    grid = [dict(zip(space, values)) for values in itertools.product(*space.values())]
    if recipe.sweep.trials is not None and recipe.sweep.trials < len(grid):
        grid = random.Random(recipe.run.seed).sample(grid, recipe.sweep.trials)
    return grid


def trial_recipe(recipe: Recipe, settings: dict[str, Any]) -> Recipe:
    """Return the recipe of one trial: the sweep's overrides, then the trial's settings.

    Every validation saves a checkpoint, so that a trial's last score belongs to its last weights.
    """
    changed = with_overrides(recipe, {**recipe.sweep.overrides, **settings})
    train = changed.train
    kept = max(2, train.keep_checkpoints)  # a stopped trial may be about to replace the checkpoint of its score
    return with_overrides(changed, {"train.checkpoint_every": train.validate_every, "train.keep_checkpoints": kept})


def trial_label(settings: dict[str, Setting]) -> str:
    """Return the settings as text."""
    return " ".join(f"{key}={value}" for key, value in settings.items())


def short_label(settings: dict[str, Setting]) -> str:
    """Return the settings as text, with shortened keys."""
    return trial_label(settings).replace("model.", "").replace("_ratio", "").replace("index_", "")


def check_space(recipe: Recipe) -> None:
    """Raise ConfigError for a space or metric without effect."""
    section = recipe.sweep
    for key, values in section.space.items():
        if not values:
            raise ConfigError(f"sweep.space: '{key}' has no values")
        if not key.startswith(("model.", "train.")) and key != "run.seed":
            raise ConfigError(f"sweep.space: '{key}' changes nothing in a trial; keys begin with model. or train.")
        if any(part.isdigit() for part in key.split(".")):
            raise ConfigError(f"sweep.space: '{key}' names an item of a list; only whole settings can be tried")
        if key in ("train.checkpoint_every", "train.keep_checkpoints"):
            raise ConfigError(f"sweep.space: '{key}' changes nothing, because a sweep sets it itself")
        if len(set(map(repr, values))) < len(values):
            raise ConfigError(f"sweep.space: '{key}' has a value twice")
    if not section.space:
        raise ConfigError("sweep.space: is empty")
    prefix, _, name = section.metric.partition("/")
    if prefix != "validation" or name.partition("/layer_")[0] not in NAMES:
        known = ", ".join(f"validation/{name}" for name in NAMES)
        raise ConfigError(f"sweep.metric: trials report no '{section.metric}'; they report {known}")


def check_trial(recipe: Recipe) -> None:
    """Raise ConfigError if a setting of a trial's recipe is overridden or does not apply."""
    last = len(recipe.train.stages) - 1
    for key, name in _STAGE_SETTINGS.items():
        if key in recipe.sweep.space and getattr(recipe.train.stages[last], name) is not None:
            raise ConfigError(
                f"sweep.space: '{key}' changes nothing, because train.stages.{last} sets {name} itself; remove it "
                "there (sweep.overrides may change train.stages)"
            )
    if recipe.sweep.in_process:
        for key, found, required in (
            ("workers", recipe.train.workers, 1),
            ("use_gpu", recipe.train.use_gpu, False),
        ):
            if found != required:
                raise ConfigError(
                    f"sweep.in_process: trials train in their own process, without Ray Train, but train.{key} is "
                    f"{found}; set sweep.in_process to false, or train.{key} to {required} in sweep.overrides"
                )
