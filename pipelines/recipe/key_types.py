"""Types of recipe keys, read from the schema."""

from __future__ import annotations

import dataclasses
import functools
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from model.errors import ConfigError, unknown_key
from model.mixers.given_options import check_option_names
from pipelines.recipe.schema import Recipe

_type_hints = functools.cache(get_type_hints)  # evaluates every annotation of a class


def fields_of(section: Any) -> dict[str, Any]:
    """Return the types of a section's fields by name; none for other types."""
    if isinstance(section, type) and dataclasses.is_dataclass(section):
        return _type_hints(section)
    return {name: field.annotation for name, field in getattr(section, "model_fields", {}).items()}


def find_section(location: tuple[int | str, ...]) -> Any:
    """Return the section at ``location``, a path into the recipe, or None."""
    section: Any = Recipe
    for part in location:
        found = fields_of(section).get(part) if isinstance(part, str) else section
        candidates = (found, *get_args(found), *(inner for outer in get_args(found) for inner in get_args(outer)))
        section = next((each for each in candidates if isinstance(each, type) and fields_of(each)), None)
    return section


def check_key(key: str) -> None:
    """Raise ConfigError for a dotted key that no recipe has. Keys within mappings and lists are not checked, except for
    options of mixers."""
    section: Any = Recipe
    reached, inner = "", key.split(".")
    while inner and section is not None:
        name, *inner = inner
        reached = f"{reached}.{name}".lstrip(".")
        known = fields_of(section)
        if name not in known:
            raise ConfigError(unknown_key(reached, name, known))
        section = next((each for each in _alternatives(known[name]) if fields_of(each)), None)
    if inner and is_single(known[name]):
        raise ConfigError(f"{key}: {reached} is a single value, without settings in it")
    if inner and reached == "model.mixer_options":
        try:
            check_option_names({inner[0]: dict.fromkeys(inner[1:2])})
        except ConfigError as error:
            raise ConfigError(f"model.{error}") from None


def type_of(key: str) -> Any:
    """Return the type of a dotted key, or None if it is unknown."""
    *section, name = key.split(".")
    return fields_of(find_section(tuple(section))).get(name)


def is_optional(annotation: Any) -> bool:
    return types.NoneType in _alternatives(annotation)


def is_text(annotation: Any) -> bool:
    """Return whether a setting of this type is text: a string, a path, or one of some words."""
    alternatives = [item for item in _alternatives(annotation) if item is not types.NoneType]
    return bool(alternatives) and all(
        item in (str, Path) or (get_origin(item) is Literal and all(isinstance(word, str) for word in get_args(item)))
        for item in alternatives
    )


def is_single(annotation: Any) -> bool:
    """Return whether a setting of this type is a single value, without settings or items in it."""
    alternatives = _alternatives(annotation)
    return bool(alternatives) and all(
        item in (int, float, bool, str, Path, types.NoneType) or get_origin(item) is Literal for item in alternatives
    )


def is_path(annotation: Any) -> bool:
    return Path in _alternatives(annotation)


def is_list_of_text(annotation: Any) -> bool:
    return any(get_origin(item) in (tuple, list) and is_text(get_args(item)[0]) for item in _alternatives(annotation))


def _alternatives(annotation: Any) -> list[Any]:
    """Return the members of a union, or the type itself, without ``Annotated``."""
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) in (Union, types.UnionType):
        return [item for member in get_args(annotation) for item in _alternatives(member)]
    return [] if annotation is None else [annotation]
