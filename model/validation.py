"""Plain sentences for pydantic's validation errors: recipes, request bodies and JSON files share them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SENTENCES = {
    "missing": "missing",
    "extra_forbidden": "unknown key",
    "bool_type": "expected true or false",
    "bool_parsing": "expected true or false",
    "int_type": "expected a whole number",
    "int_parsing": "expected a whole number",
    "int_from_float": "expected a whole number",
    "int_parsing_size": "expected a whole number with fewer digits",
    "float_type": "expected a number",
    "float_parsing": "expected a number",
    "finite_number": "expected a finite number",
    "string_type": "expected text",
    "string_unicode": "expected text in valid Unicode",
    "string_too_short": "expected at least {min_length} characters",
    "string_too_long": "expected at most {max_length} characters",
    "tuple_type": "expected a list",
    "list_type": "expected a list",
    "too_short": "expected at least {min_length} items",
    "too_long": "expected at most {max_length} items",
    "dict_type": "expected a mapping",
    "model_type": "expected a mapping",
    "model_attributes_type": "expected a mapping",
    "dataclass_type": "expected a mapping",
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
    "literal_error": "expected {expected}",
}


def expectation(error: Mapping[str, Any]) -> str | None:
    """Return what one of pydantic's errors expects of a value, without the value; None for errors that a validator
    raised with a sentence of its own."""
    if error["type"] in ("too_short", "string_too_short") and error["ctx"]["min_length"] == 1:
        return "must not be empty"
    expected = _SENTENCES.get(error["type"])
    bounds = {name: f"{value:g}" if isinstance(value, float) else value for name, value in error.get("ctx", {}).items()}
    return None if expected is None else expected.format_map(bounds)


def sentence(error: Mapping[str, Any]) -> str:
    """Return the sentence for one of pydantic's errors, without the value."""
    return expectation(error) or error["msg"].removeprefix("Value error, ")
