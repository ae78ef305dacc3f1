"""Base of request schemas, and types that several of them use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from serve.api.schemas.neutral_fields import drop_neutral
from serve.api.schemas.validation import missing, unknown_field, wrong, wrong_item


class RequestBody(BaseModel):
    # Strict: "0.5" is not a number and true is not 1. Unknown fields are errors, because a field that is silently
    # ignored looks like a setting without effect.
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    required: ClassVar[Mapping[str, str]] = {}
    """Expected values of the fields without a default, for the error if one is missing."""
    counterparts: ClassVar[Mapping[str, str]] = {}
    """Fields of other routes, each with the field of this route that corresponds to it, for the error about an unknown
    field."""
    neutral_values: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    neutral_types: ClassVar[Mapping[str, tuple[type, ...]]] = {}
    """Fields that the server does not have and accepts where they change nothing, as in
    :mod:`serve.api.schemas.neutral_fields`."""

    @model_validator(mode="before")
    @classmethod
    def _check_fields(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        fields = drop_neutral(value, cls.neutral_values, cls.neutral_types)
        for name in fields:
            if name not in cls.model_fields:
                raise unknown_field(name, name, cls.model_fields, cls.counterparts)  # pydantic would list all
        for name, expected in cls.required.items():
            if name not in fields:
                raise missing(name, expected)
        return fields


def integral(value: Any) -> Any:
    """Return 16.0 as 16: JSON has one type for both, and some languages always write the point."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Integer = Annotated[int, BeforeValidator(integral)]
MAX_INTEGER = 2**31 - 1
"""Limit on counts that the model's context or vocabulary limits further."""
MAX_NAME_CHARS = 1000
ModelName = Annotated[str, Field(max_length=MAX_NAME_CHARS)]
"""Name of a model in a request."""


def parse_strings(value: list[Any]) -> list[str]:
    """Return a list of strings. Raises an error that names the first other item."""
    for index, item in enumerate(value):
        if not isinstance(item, str):
            raise wrong_item(index, "a string", item)
    return value


def parse_tokens(value: Any, path: str = "") -> list[int]:
    """Return a list of token IDs. Raises an error that names the first other item.

    ``path`` is the prefix of the items' paths in the field, such as ``3.`` for a list in a list.
    """
    if not isinstance(value, list):
        raise wrong("a list of token IDs", value)
    if set(map(type, value)) <= {int}:  # fast, because there may be millions
        return value
    ids = [integral(item) for item in value]
    for index, item in enumerate(ids):
        if type(item) is not int:
            raise wrong_item(f"{path}{index}", "a token ID", item)
    return ids
