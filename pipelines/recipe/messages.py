"""Validation errors of a recipe as short sentences that name the key."""

from __future__ import annotations

from typing import Any

import pydantic

from model.errors import shorten_words, unknown_key
from model.validation import expectation, own_message
from model.wording import quote
from pipelines.recipe.key_types import fields_of, find_section


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
        known = fields_of(find_section(item["loc"][:-1]))
        return unknown_key(key, str(item["loc"][-1]), known)
    message = expectation(item) or own_message(item)
    if item["type"] == "string_type" and isinstance(item["input"], bool | int | float):
        message += "; put it in quotes"
    elif item["type"] in ("model_type", "model_attributes_type", "dataclass_type"):
        message = "expected a section of settings"
    key = shorten_words(key)
    if item["input"] is None:
        return f"{key}: {message}, found nothing"
    is_section = isinstance(item["input"], dict)
    return f"{key}: {message}" if is_section else f"{key}: {message}, found {quote(item['input'])}"
