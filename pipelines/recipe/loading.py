"""Loading of recipes from YAML files, ``key=value`` overrides and plain values.

Later files override earlier ones, and the command line overrides all files. Unknown keys, wrong types and values out of
range raise ConfigError with one line per key.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pydantic

from model.errors import ConfigError
from model.wording import quote
from pipelines import RAY_JOB_VARIABLE
from pipelines.recipe.experiments import Range
from pipelines.recipe.key_types import check_key, is_path, is_single, type_of
from pipelines.recipe.keys import get_key, merge, set_key
from pipelines.recipe.messages import describe_errors, naming, with_suggestion
from pipelines.recipe.overrides import nested
from pipelines.recipe.paths import parse_path
from pipelines.recipe.schema import Recipe
from pipelines.recipe.section import Section
from pipelines.recipe.yaml_format import parse_yaml

_MAX_FILE_BYTES = 1_000_000
_STARTING_POINTS = ("model.preset", "model.depth", "model.family")
"""Keys from which all fields of the model follow."""
_TOO_LATE = "cannot be changed here, because every field of the model is already set"


def load_recipe(files: Sequence[str | Path], overrides: Sequence[str] = ()) -> Recipe:
    """Merge YAML ``files`` and ``key=value`` ``overrides`` into a validated recipe. Raises ConfigError."""
    merged: dict[str, Any] = {}
    for file in files:
        with naming("--config"):
            merged = _merge_file(merged, file, read_yaml(file))
    later = nested(overrides)
    try:
        merged = _merge_over(merged, later)
    except ConfigError as error:
        key = error.field or ""
        raise ConfigError(f"cannot be set to {quote(get_key(later, key))} ({error.reason})", key) from error
    return recipe_from_dict(merged)


def overlay(recipe: Recipe, file: str | Path) -> Recipe:
    """Return ``recipe`` with the settings of a YAML file merged over it. Raises ConfigError, also for a preset."""
    later = read_yaml(file)
    for key in _STARTING_POINTS:
        if get_key(later, key) is not None:
            raise ConfigError(f"{file}: {key}: {_TOO_LATE}")
    return recipe_from_dict(_merge_file(recipe.to_dict(), file, later))


def with_overrides(recipe: Recipe, overrides: dict[str, Any]) -> Recipe:
    """Return a copy of ``recipe`` with dotted keys replaced, validated again. Raises ConfigError."""
    values = recipe.to_dict()
    for key, value in overrides.items():
        if key in _STARTING_POINTS:
            raise ConfigError(f"{key}: {_TOO_LATE}")
        set_key(values, key, copy.deepcopy(value))
        if key == "model.vocab_size" and "data.vocabulary" not in overrides:
            set_key(values, "data.vocabulary", "model")
    return recipe_from_dict(values)


def recipe_from_dict(values: Any) -> Recipe:
    """Validate plain values. Raises ConfigError with one line per invalid key."""
    try:
        recipe = Recipe.model_validate(values)
    except pydantic.ValidationError as error:
        raise ConfigError(describe_errors(error)) from None
    except ConfigError as error:
        raise ConfigError(with_suggestion(str(error))) from None
    _check_keys(recipe)
    if not recipe.run.folder.is_absolute() and RAY_JOB_VARIABLE in os.environ:
        raise ConfigError(
            f"run.folder: '{recipe.run.folder}' is relative, but a submitted job runs in a temporary copy of the "
            "project; pass --run.folder with an absolute path"
        )
    # Ray workers run in their own folders, so a recipe sent to them must hold absolute paths.
    recipe = _with_absolute_paths(recipe)
    sweep = recipe.sweep
    space = {
        key: items if isinstance(items, Range) else [_absolute(f"sweep.space.{key}", key, item) for item in items]
        for key, items in sweep.space.items()
    }
    overrides = {key: _absolute(f"sweep.overrides.{key}", key, value) for key, value in sweep.overrides.items()}
    return recipe.model_copy(update={"sweep": sweep.model_copy(update={"space": space, "overrides": overrides})})


def _check_keys(recipe: Recipe) -> None:
    """Raise ConfigError for unknown dotted keys in the sweep section and in variants of the ablation."""
    for key in recipe.sweep.space:
        outer, _, name = key.rpartition(".")
        if is_single(type_of(outer)):  # as from a range that does not exist
            kinds = ", ".join(["choice", *Range.model_fields])
            raise ConfigError(f"sweep.space.{outer}: expected a list of values or one of {kinds}, found '{name}'")
    changes = {"sweep.space": recipe.sweep.space, "sweep.overrides": recipe.sweep.overrides}
    changes |= {f"ablate.variants.{name}": values for name, values in recipe.ablate.variants.items()}
    for section, values in changes.items():
        for key in values:
            if key in _STARTING_POINTS:
                raise ConfigError(f"{section}.{key}: {_TOO_LATE}")
            try:
                check_key(key)
            except ConfigError as error:
                raise ConfigError(f"{section}.{with_suggestion(str(error))}") from None


def read_yaml(file: str | Path) -> dict[str, Any]:
    """Return the mapping that a YAML file holds. Raises ConfigError naming the file."""
    try:
        with Path(file).open("rb") as stream:  # possibly a pipe
            text = stream.read(_MAX_FILE_BYTES + 1)
        if len(text) > _MAX_FILE_BYTES:
            raise ConfigError(f"larger than {_MAX_FILE_BYTES:,} bytes")
        content = parse_yaml(text)
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from error
    except ConfigError as error:
        raise ConfigError(f"{file}: not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: expected a mapping of sections at the top level")
    return content


def _with_absolute_paths(value: Any) -> Any:
    if isinstance(value, Path):
        return value.absolute()
    if isinstance(value, tuple):
        return tuple(map(_with_absolute_paths, value))
    if isinstance(value, Section):
        return value.model_copy(update={name: _with_absolute_paths(item) for name, item in value})
    return value


def _absolute(name: str, key: str, value: Any) -> Any:
    """Return the value of recipe key ``key`` in a sweep, as an absolute path if it is a path."""
    if value is None or not is_path(type_of(key)):
        return value
    try:
        return str(parse_path(value).absolute())
    except ValueError as error:
        raise ConfigError(f"{name}: {error}, found {quote(value)}") from None


def _merge_file(merged: dict[str, Any], file: str | Path, content: dict[str, Any]) -> dict[str, Any]:
    try:
        return _merge_over(merged, content)
    except ConfigError as error:
        raise ConfigError(f"{file}: does not fit the files before it ({error})") from error


def _merge_over(earlier: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    """Merge ``later`` over ``earlier``. A sweep space, a mixture of retrieval tasks, a preset or a depth replaces the
    earlier one. A preset also replaces the family of a depth. A vocabulary size is that of the network, unless
    ``data.vocabulary`` says otherwise."""
    earlier = copy.deepcopy(earlier)
    for section, name in (("sweep", "space"), ("data", "retrieval_tasks")):
        if get_key(later, f"{section}.{name}") is not None and get_key(earlier, f"{section}.{name}"):
            del earlier[section][name]
    if get_key(later, "model.vocab_size") is not None and get_key(later, "data.vocabulary") is None:
        later = merge(later, {"data": {"vocabulary": "model"}})
    for given, replaced in (("depth", "preset"), ("preset", "depth"), ("preset", "family")):
        if get_key(later, f"model.{given}") is not None and get_key(earlier, f"model.{replaced}"):
            del earlier["model"][replaced]
    return merge(earlier, later)
