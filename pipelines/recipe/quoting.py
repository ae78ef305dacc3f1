"""Values in error messages."""

from __future__ import annotations

import reprlib
from typing import Any

_MAX_CHARACTERS = 200


def shorten(value: Any) -> str:
    """Return a value as it is quoted in an error message."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = _MAX_CHARACTERS
    return short.repr(value)
