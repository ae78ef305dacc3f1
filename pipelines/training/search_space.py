"""The search space of a sweep: points, trial recipes and their checks."""

from __future__ import annotations

import itertools
import json
import math
import random
import sys
from collections.abc import Collection, Iterable, Iterator
from typing import Any, Literal

from model.config import ModelConfig
from model.errors import ConfigError
from model.wording import quote
from pipelines.data.manifest import Kind
from pipelines.recipe.experiments import Range, Setting
from pipelines.recipe.loading import with_overrides
from pipelines.recipe.schema import Recipe
from pipelines.training.curriculum import curriculum
from pipelines.training.validation import metric_names

_STAGE_SETTINGS = {
    "model.index_topk": "index_topk",
    "model.qat": "qat",
    "train.batch_rows": "batch_rows",
    "train.optimizer.indexer_learning_rate": "indexer_learning_rate",
}
"""Recipe keys that a stage may override, and the stage's field."""
_LIST = "list:"
_SAMPLES = 128
_MAX_MODELS = 20_000
_MAX_GRID = 1_000_000
"""Maximum number of points of a grid that is tried as a whole."""


def search_of(recipe: Recipe) -> Literal["random", "optuna"]:
    """Return how the points of the space are chosen."""
    ranges = any(isinstance(values, Range) for values in recipe.sweep.space.values())
    return recipe.sweep.search or ("optuna" if ranges else "random")


def combinations(recipe: Recipe) -> list[dict[str, Setting]]:
    """Return the settings of each trial by dotted key: the whole grid, or ``sweep.trials`` random points."""
    space, trials = recipe.sweep.space, recipe.sweep.trials
    rng = random.Random(recipe.run.seed)
    lists = {key: values for key, values in space.items() if not isinstance(values, Range)}
    size = math.prod(map(len, lists.values()))
    if len(lists) < len(space) or size > sys.maxsize:  # a duplicate draw is practically impossible
        return [_draw(recipe, rng) for _ in range(trials or 0)]
    if trials is None or trials >= size:
        return [dict(zip(lists, values)) for values in itertools.product(*lists.values())]
    return [_point_of_grid(lists, index) for index in rng.sample(range(size), trials)]


def _point_of_grid(lists: dict[str, list[Setting]], index: int) -> dict[str, Setting]:
    """Return the point at ``index`` of the grid, in the order of ``itertools.product``."""
    point: dict[str, Setting] = {}
    for key, values in reversed(lists.items()):
        index, i = divmod(index, len(values))
        point[key] = values[i]
    return {key: point[key] for key in lists}


def sample_points(recipe: Recipe) -> list[dict[str, Setting]]:
    """Return random points of a space."""
    rng = random.Random(recipe.run.seed)
    return [_draw(recipe, rng) for _ in range(_SAMPLES)]


def extreme_models(recipe: Recipe) -> Iterator[ModelConfig]:
    """Yield the valid models of a space at all values of lists and at both ends of ranges.

    Caches are smallest and largest there, because their closed form is monotonic in every number. Yields nothing if
    there are too many, or if the space changes options of single mixers.
    """
    space = {key: _ends(values) for key, values in recipe.sweep.space.items() if key.startswith("model.")}
    fields = [key.removeprefix("model.") for key in space]
    if math.prod(map(len, space.values())) > _MAX_MODELS or any("." in name for name in fields):
        return
    base = trial_recipe(recipe, {}).model
    for values in itertools.product(*space.values()):
        try:
            yield base.replace(**dict(zip(fields, values)))
        except ConfigError:
            continue


def _ends(values: list[Setting] | Range) -> list[Setting]:
    return list(values.bounds) if isinstance(values, Range) else values


def _draw(recipe: Recipe, rng: random.Random) -> dict[str, Setting]:
    return {key: _draw_value(values, rng) for key, values in recipe.sweep.space.items()}


def _draw_value(values: list[Setting] | Range, rng: random.Random) -> Setting:
    if not isinstance(values, Range):
        return rng.choice(values)
    if values.int is not None:
        return rng.randint(*values.int)
    low, high = values.bounds
    if values.log_uniform is not None:
        return math.exp(rng.uniform(math.log(low), math.log(high)))
    return rng.uniform(low, high)


def encode(value: Setting) -> bool | int | float | str:
    """Return a value for Optuna, whose categories are scalars."""
    return f"{_LIST}{json.dumps(value)}" if isinstance(value, list) else value


def decode(settings: dict[str, Any]) -> dict[str, Setting]:
    """Return settings with the lists that :func:`encode` wrote as text."""
    return {
        key: json.loads(value[len(_LIST) :]) if isinstance(value, str) and value.startswith(_LIST) else value
        for key, value in settings.items()
    }


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
    return " ".join(f"{key}={_format(value)}" for key, value in settings.items())


def _format(value: Setting) -> str:
    if isinstance(value, list):
        return ",".join(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def short_label(settings: dict[str, Setting]) -> str:
    """Return the settings as text, with shortened keys."""
    label = trial_label(settings)
    for part in ("model.", "train.optimizer.", "_ratio", "index_"):
        label = label.replace(part, "")
    return label


def check_space(recipe: Recipe) -> None:
    """Raise ConfigError for a space without effect, and for overrides that make the recipe invalid."""
    section = recipe.sweep
    try:
        trial_recipe(recipe, {})
    except ConfigError as error:
        raise ConfigError(f"sweep.overrides: {error}") from None
    for key, values in section.space.items():
        if not key.startswith(("model.", "train.")) and key != "run.seed":
            raise ConfigError(f"sweep.space: '{key}' changes nothing in a trial; keys begin with model. or train.")
        if any(part.isdigit() for part in key.split(".")):
            raise ConfigError(f"sweep.space: '{key}' names an item of a list; only whole settings can be tried")
        if key in ("train.checkpoint_every", "train.keep_checkpoints"):
            raise ConfigError(f"sweep.space: '{key}' changes nothing, because a sweep sets it itself")
        if isinstance(values, Range) and section.trials is None:
            raise ConfigError(f"sweep.trials: is not set, but '{key}' has a range of values")
        if key.startswith("model.mixer_options.") and "model.layers" not in section.space:
            mixer = key.split(".")[2]
            if mixer not in recipe.model.layers:
                raise ConfigError(f"sweep.space: '{key}' changes nothing, because model.layers has no '{mixer}'")
    if not section.space:
        raise ConfigError("sweep.space: is empty")
    if section.search == "optuna" and section.trials is None:
        raise ConfigError("sweep.trials: is not set, but sweep.search is optuna")
    points = math.prod(len(_ends(values)) for values in section.space.values())
    if section.trials is None and points > _MAX_GRID:
        raise ConfigError(f"sweep.trials: is not set, but the grid of sweep.space has {points:,} points")


def check_metric(recipe: Recipe, points: Iterable[dict[str, Setting]], kinds: Collection[Kind]) -> None:
    """Raise ConfigError unless all valid ``points`` log ``sweep.metric`` in every stage, on validation rows of
    ``kinds``."""
    logged: list[list[str]] = []
    for settings in points:
        try:
            stages = curriculum(trial_recipe(recipe, settings))
        except ConfigError:
            continue
        logged += [metric_names(stage.model, kinds, recipe.data.sequence_length) for stage in stages]
    if not logged:
        return
    common = [name for name in logged[0] if all(name in names for names in logged)]
    if recipe.sweep.metric not in common:
        shown = ", ".join(name for name in common if "/layer_" not in name)
        raise ConfigError(f"sweep.metric: expected one of {shown}, found {quote(recipe.sweep.metric)}")


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
