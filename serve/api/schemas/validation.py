"""Errors of request validation that name one field."""

from __future__ import annotations

from typing import Any

from pydantic_core import PydanticCustomError


def field_error(field: str, problem: str) -> PydanticCustomError:
    """Return an error that a validator of a whole model raises about one of its fields."""
    return PydanticCustomError("field", "{problem}", {"field": field, "problem": problem})


def describe(item: Any) -> tuple[str, str]:
    """Return the message and the outermost field of one of pydantic's errors about a JSON object."""
    path = [str(part) for part in item["loc"] if part != "body"]
    problem = item["msg"].removeprefix("Value error, ")
    if item["type"] == "field":
        path.append(item["ctx"]["field"])
        problem = item["ctx"]["problem"]
    elif item["type"] == "missing":
        problem = "missing"
    return f"{'.'.join(path)}: {problem}", path[0]
