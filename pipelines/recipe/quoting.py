"""Values and other errors in error messages."""

from __future__ import annotations

import reprlib
from typing import Any

_MAX_CHARACTERS, _MAX_DIGITS = 200, 40


def shorten(value: Any) -> str:
    """Return a value as it is quoted in an error message."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = _MAX_CHARACTERS
    short.maxlong = _MAX_DIGITS
    return short.repr(value)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
