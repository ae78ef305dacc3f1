"""Validation errors of a recipe as short sentences that name the key."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args, get_type_hints

import pydantic

from model.errors import unknown_key
from pipelines.recipe.schema import Recipe


def describe_errors(error: pydantic.ValidationError) -> str:
    """Return one sentence per invalid key, separated by semicolons."""
    return "; ".join(map(_describe, _root_causes(error)))


def _root_causes(error: pydantic.ValidationError) -> list[Any]:
    """Drop errors that follow from others: a list with invalid items is also reported as too short."""
    errors = error.errors()
    invalid = {item["loc"][:n] for item in errors for n in range(len(item["loc"]))}
    return [item for item in errors if not (item["type"] == "too_short" and item["loc"] in invalid)]


def _describe(item: Any) -> str:
    key = ".".join(str(part) for part in item["loc"])
    if item["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return unknown_key(key, str(item["loc"][-1]), _sibling_keys(item["loc"]))
    message = item["msg"].removeprefix("Value error, ")
    is_section = isinstance(item["input"], dict)
    return f"{key}: {message}" if is_section else f"{key}: {message}, found {item['input']!r}"


def _sibling_keys(location: tuple[int | str, ...]) -> list[str]:
    """Return the valid keys of the section in which ``location``, a path into the recipe, ends."""
    section: Any = Recipe
    for part in location[:-1]:
        found = _fields(section)[part] if isinstance(part, str) else section
        types = (found, *get_args(found), *(inner for argument in get_args(found) for inner in get_args(argument)))
        section = next((candidate for candidate in types if _fields(candidate)), None)
    return list(_fields(section))


def _fields(section: Any) -> dict[str, Any]:
    if dataclasses.is_dataclass(section):
        return get_type_hints(section)
    return {name: field.annotation for name, field in getattr(section, "model_fields", {}).items()}
