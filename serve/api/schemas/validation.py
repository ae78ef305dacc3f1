"""Errors of request validation that name one field."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from pydantic_core import PydanticCustomError

from model.errors import did_you_mean
from model.validation import expectation, sentence
from model.wording import json_type, quote_json

_JSON_SENTENCES = {"string_type": "expected a string"} | dict.fromkeys(
    ("dict_type", "model_type", "model_attributes_type", "dataclass_type"), "expected an object"
)


def quote_value(value: Any) -> str:
    """Return a value of a request. Lists and objects that are not empty, which can be large, are only named."""
    return json_type(value) if isinstance(value, list | dict) and value else quote_json(value)


def field_error(path: str | tuple[str, ...], problem: str) -> PydanticCustomError:
    """Return an error that a validator of a whole model raises about the field at ``path``: its name, or a tuple of
    names for a field within a field."""
    names = (path,) if isinstance(path, str) else path
    return PydanticCustomError("field", "{problem}", {"path": names, "problem": problem})


def unknown_field(
    path: str, name: str, known: Iterable[str], counterparts: Mapping[str, str] = MappingProxyType({})
) -> PydanticCustomError:
    """Return an error about the field ``name`` at ``path``, with its counterpart or else the most similar known field
    if any."""
    suggestion = f"; did you mean '{counterparts[name]}'?" if name in counterparts else did_you_mean(name, known)
    return field_error(path if name else f'{path}""', f"unknown field{suggestion}")


def missing(path: str, expected: str) -> PydanticCustomError:
    """Return an error about a field that is missing or null."""
    return field_error(path, f"missing, expected {expected}")


def wrong(expected: str, found: Any) -> ValueError:
    """Return an error that a validator of one field raises about its value."""
    return ValueError(f"expected {expected}, found {quote_value(found)}")


def wrong_item(path: str | int, expected: str, found: Any) -> PydanticCustomError:
    """Return an error that a validator raises about an inner value: an item of a list, or a field of an object."""
    return field_error(str(path), f"expected {expected}, found {quote_value(found)}")


def describe(item: Any) -> tuple[str, str]:
    """Return the message and the outermost field of one of pydantic's errors about a JSON object."""
    path = [str(part) for part in item["loc"] if part != "body"]
    if item["type"] == "field":
        path += item["ctx"]["path"]
        problem = item["ctx"]["problem"]
    elif expected := _JSON_SENTENCES.get(item["type"]) or expectation(item):
        problem = f"{expected}, found {quote_value(item['input'])}"
    else:
        problem = sentence(item)
    return f"{'.'.join(path)}: {problem}", path[0]
