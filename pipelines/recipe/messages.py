"""Error messages that name the key: validation errors of a recipe, and errors about what a setting refers to."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pydantic

from model.errors import CheckpointError, ConfigError, shorten_words, unknown_key
from model.validation import sentence
from model.wording import quote
from pipelines.recipe.key_types import fields_of, find_section
from pipelines.recipe.schema import Recipe

_MAX_SUGGESTIONS = 3


@contextmanager
def naming(key: str | None, key_of: Callable[[str], str | None] = lambda field: None) -> Iterator[None]:
    """Name the key, a dotted key or an option, in errors about settings and checkpoints in the block.

    In a ConfigError with a ``field`` for which ``key_of`` returns a key, that key replaces the field. In other errors,
    ``key`` comes before the message, unless it is None.
    """
    try:
        yield
    except (ConfigError, CheckpointError) as error:
        if isinstance(error, ConfigError) and error.field is not None:
            found = key_of(error.field)
            if found is not None:
                raise ConfigError(error.reason, found) from error
        if key is None:
            raise
        raise type(error)(f"{key}: {error}") from error


def describe_errors(error: pydantic.ValidationError) -> str:
    """Return one sentence per invalid key, separated by semicolons."""
    return "; ".join(map(_describe, _root_causes(error)))


def _root_causes(error: pydantic.ValidationError) -> list[Any]:
    """Drop errors that follow from others: a list with invalid items is also reported as too short."""
    errors = error.errors()
    invalid = {item["loc"][:n] for item in errors for n in range(len(item["loc"]))}
    return [item for item in errors if not (item["type"] == "too_short" and item["loc"] in invalid)]


def _describe(item: Any) -> str:
    location, value = item["loc"], item["input"]
    if item["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        key = ".".join(str(part) for part in location)
        return with_suggestion(unknown_key(key, str(location[-1]), fields_of(find_section(location[:-1]))))
    if location[-1:] == ("[key]",):
        location = location[:-2]  # the mapping; the message quotes its key
    message = sentence(item)
    setting = re.match(r"(\w+): ", message)
    if setting is not None and setting[1] in fields_of(find_section(location)):  # a check of a whole section
        location, message = (*location, setting[1]), message[setting.end() :]
    if item["type"] == "string_type" and isinstance(value, bool | int | float):
        message += "; put it in quotes"
    elif item["type"] in ("model_type", "model_attributes_type", "dataclass_type"):
        message = "expected a section of settings"
    key = shorten_words(".".join(str(part) for part in location))
    if ", found " in message or (isinstance(value, dict) and not message.startswith("expected")):
        return f"{key}: {message}"  # a check that says itself what it found, or one of a whole section
    return f"{key}: {message}, found {'a mapping' if isinstance(value, dict) else quote(value)}"


def with_suggestion(message: str) -> str:
    """Return the message for an unknown key with the keys of other sections that have the same last part, if any."""
    unknown = re.match(r"(\S+): unknown key", message)
    if unknown is None:
        return message
    name = unknown[1].rpartition(".")[2]
    found = [f"'{key}'" for key in _keys(Recipe, "") if key.rpartition(".")[2] == name][:_MAX_SUGGESTIONS]
    others = ", ".join(found[:-1])
    return f"{unknown[0]}; did you mean {f'{others} or ' * bool(others)}{found[-1]}?" if found else message


def _keys(section: Any, prefix: str) -> Iterator[str]:
    """Yield the dotted keys of a section's settings, in the order of the schema."""
    for name, annotation in fields_of(section).items():
        yield f"{prefix}{name}"
        yield from _keys(annotation, f"{prefix}{name}.")
