"""Base class and common types of the recipe's sections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Self, TypeVar, cast

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, GetCoreSchemaHandler, model_validator
from pydantic_core import core_schema

from model.wording import quote

MAX_LENGTH = 1 << 24
"""Limit on the tokens of a row or document."""
Share = Annotated[float, Field(ge=0, le=1)]
_Values = TypeVar("_Values", bound=Sequence)


def check_distinct(values: _Values) -> _Values:
    """Return ``values``. Raises ValueError if a value occurs twice. Unlike in Python, true differs from 1."""
    typed = [(isinstance(value, bool), value) for value in values]
    for index, value in enumerate(values):
        if typed[index] in typed[:index]:
            raise ValueError(f"has the value {quote(value)} twice")
    return values


Distinct = AfterValidator(check_distinct)
"""Refuses a list in which a value occurs twice."""


def _refuse_boolean(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("expected a number")
    return value


def _tell_booleans_from_numbers(schema: Any) -> Any:
    """Return a core schema whose numbers refuse ``true`` and whose booleans refuse 1. Otherwise ``port: true`` would
    be port 1."""
    if isinstance(schema, list | tuple):
        return type(schema)(map(_tell_booleans_from_numbers, schema))
    if not isinstance(schema, dict):
        return schema
    kind = schema.get("type")
    if kind in ("int", "float"):
        return core_schema.no_info_before_validator_function(_refuse_boolean, cast(Any, schema))
    if kind == "union" and all(
        isinstance(item, dict) and item["type"] in ("int", "float") for item in schema["choices"]
    ):
        return core_schema.no_info_before_validator_function(_refuse_boolean, cast(Any, schema))
    if kind == "bool":
        return {**schema, "strict": True}
    inner = schema.get("function")
    if kind == "function-before" and isinstance(inner, dict) and inner.get("function") is _refuse_boolean:
        return schema
    skipped = ("metadata", "serialization", "config", "cls", "default", "function")
    return {key: item if key in skipped else _tell_booleans_from_numbers(item) for key, item in schema.items()}


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return _tell_booleans_from_numbers(handler(source))

    @model_validator(mode="after")
    def _check_integers(self) -> Self:
        for name, value in self:
            if isinstance(value, int) and not -(2**63) <= value < 2**63:
                raise ValueError(f"{name}: is not a 64-bit integer")
        return self
