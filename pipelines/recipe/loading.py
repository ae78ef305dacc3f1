"""Loading of recipes from YAML files, ``key=value`` overrides and plain values.

Later files override earlier ones, and the command line overrides all files. Unknown keys, wrong types and values out of
range raise ConfigError with one line per key.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pydantic
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from model.errors import ConfigError
from pipelines.recipe.messages import describe_errors
from pipelines.recipe.schema import Recipe

_STARTING_POINTS = ("model.preset", "model.depth")


def load_recipe(files: Sequence[str | Path], overrides: Sequence[str] = ()) -> Recipe:
    """Merge YAML ``files`` and ``key=value`` ``overrides`` into a validated recipe. Raises ConfigError."""
    return _merge(OmegaConf.create({}), files, overrides)


def overlay(recipe: Recipe, file: str | Path) -> Recipe:
    """Return ``recipe`` with the settings of a YAML file merged over it. Raises ConfigError, also for a preset."""
    for key in _STARTING_POINTS:
        if OmegaConf.select(_read(file), key) is not None:
            raise ConfigError(f"{file}: {key}: cannot be changed here, because every field of the model is already set")
    return _merge(OmegaConf.create(recipe.to_dict()), [file], [])


def with_overrides(recipe: Recipe, overrides: dict[str, Any]) -> Recipe:
    """Return a copy of ``recipe`` with dotted keys replaced, validated again. Raises ConfigError."""
    base = OmegaConf.create(recipe.to_dict())
    for key, value in overrides.items():
        if key in _STARTING_POINTS:
            raise ConfigError(f"{key}: cannot be changed here, because every field of the model is already set")
        OmegaConf.update(base, key, value, merge=False)
    return recipe_from_dict(OmegaConf.to_container(base))


def recipe_from_dict(values: Any) -> Recipe:
    """Validate plain values. Raises ConfigError with one line per invalid key."""
    try:
        recipe = Recipe.model_validate(values)
    except pydantic.ValidationError as error:
        raise ConfigError(describe_errors(error)) from None
    if not recipe.run.folder.is_absolute() and "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        raise ConfigError(
            f"run.folder: '{recipe.run.folder}' is relative, but a submitted job runs in a temporary copy of the "
            "project; pass --run.folder with an absolute path"
        )
    # Ray workers run in their own folders, so a recipe sent to them must hold absolute paths.
    return recipe.model_copy(
        update={
            "run": recipe.run.model_copy(update={"folder": recipe.run.folder.absolute()}),
            "train": recipe.train.model_copy(update={"init_from": _absolute(recipe.train.init_from)}),
            "compare": recipe.compare.model_copy(
                update={name: tuple(map(Path.absolute, getattr(recipe.compare, name))) for name in ("qat", "plain")}
            ),
            "evaluate": recipe.evaluate.model_copy(update={"checkpoint": _absolute(recipe.evaluate.checkpoint)}),
        }
    )


def _absolute(path: Path | None) -> Path | None:
    return None if path is None else path.absolute()


def _read(file: str | Path) -> Any:
    try:
        content = OmegaConf.load(file)
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from error
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from error
    if not OmegaConf.is_dict(content):
        raise ConfigError(f"{file}: expected a mapping of sections at the top level")
    return content


def _merge(merged: Any, files: Sequence[str | Path], overrides: Sequence[str]) -> Recipe:
    for file in files:
        try:
            merged = _merge_over(merged, _read(file))
        except (OmegaConfBaseException, TypeError, ValueError) as error:
            raise ConfigError(f"{file}: does not fit the files before it ({' '.join(str(error).split())})") from error
    for override in overrides:  # first one by one, so that an error names the invalid override
        try:
            _merge_over(merged.copy(), OmegaConf.from_dotlist([override]))
        except (OmegaConfBaseException, YAMLError, TypeError, ValueError) as error:
            key, _, value = override.partition("=")
            raise ConfigError(f"{key}: cannot be set to {value!r} ({' '.join(str(error).split())})") from error
    try:
        merged = _merge_over(merged, OmegaConf.from_dotlist(list(overrides)))
    except (OmegaConfBaseException, YAMLError, TypeError, ValueError) as error:
        raise ConfigError(f"command line: {' '.join(str(error).split())}") from error
    try:
        values = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"recipe: {' '.join(str(error).split())}") from error
    return recipe_from_dict(values)


def _merge_over(earlier: Any, later: Any) -> Any:
    """Merge ``later`` over ``earlier``. A sweep space, a preset or a depth replaces the earlier one."""
    if OmegaConf.select(later, "sweep.space") is not None and OmegaConf.select(earlier, "sweep.space"):
        del earlier.sweep.space
    for given, replaced in (("depth", "preset"), ("preset", "depth")):
        if OmegaConf.select(later, f"model.{given}") is not None and OmegaConf.select(earlier, f"model.{replaced}"):
            del earlier.model[replaced]
    return OmegaConf.merge(earlier, later)
