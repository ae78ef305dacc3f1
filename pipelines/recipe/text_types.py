"""Types of text settings."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field


def _check_alias(alias: str) -> str:
    if alias.lower() == "latest" or re.fullmatch(r"[vV]\d+", alias):
        raise ValueError("MLflow reserves this alias")
    return alias


def _matching(pattern: str, expected: str) -> AfterValidator:
    """Return a validator of text that matches a regular expression, described by ``expected``."""

    def check(text: str) -> str:
        if not re.fullmatch(pattern, text, re.ASCII):
            raise ValueError(f"expected {expected}")
        return text

    return AfterValidator(check)


def _check_printable(text: str) -> str:
    if not text.isprintable() or text.isspace():
        raise ValueError("expected printable characters")
    return text


Text = Annotated[str, Field(max_length=500)]
"""Text that is short enough to quote in error messages."""
PrintableText = Annotated[Text, Field(min_length=1), AfterValidator(_check_printable)]
Name = Annotated[
    str,
    Field(max_length=128),
    _matching(r"[A-Za-z0-9][A-Za-z0-9_.-]*", "letters, digits, '_', '.' and '-', beginning with a letter or digit"),
]
"""The name of a folder, an MLflow run, or a registered or served model."""
Alias = Annotated[
    str,
    Field(max_length=128),
    _matching(r"[A-Za-z][A-Za-z0-9_-]*", "letters, digits, '_' and '-', beginning with a letter"),
    AfterValidator(_check_alias),
]
"""An alias of a model version."""
RecipeKey = Annotated[
    str, Field(max_length=128), _matching(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)+", "a dotted key such as model.window")
]
"""A dotted key; MLflow stores the keys of a sweep as names of parameters."""
