"""Checks of mixer options. ``key`` is the option's full name, which errors begin with."""

from __future__ import annotations

import sys
from typing import Any, TypeGuard

from model.mixers.base import require
from model.wording import quote

_MOST = (1 << 31) - 1


def check_count(key: str, value: Any, least: int = 1, optional: bool = False) -> None:
    """Raise ConfigError unless ``value`` is a whole number from ``least`` to 2 ** 31 - 1, or None if it is
    ``optional``."""
    counts = type(value) is int and least <= value <= _MOST
    most = f" and at most {_MOST}" * (type(value) is int and value > _MOST)
    expected = f"a whole number of at least {least}{most}{' or null' * optional}"
    require(counts or (optional and value is None), f"expected {expected}, found {quote(value)}", key)


def check_flag(key: str, value: Any) -> None:
    """Raise ConfigError unless ``value`` is a bool."""
    require(isinstance(value, bool), f"expected true or false, found {quote(value)}", key)


def check_number(key: str, value: Any, least: float = 0) -> None:
    """Raise ConfigError unless ``value`` is a finite number of at least ``least``."""
    require(is_number(value) and value >= least, f"expected a number of at least {least}, found {quote(value)}", key)


def check_positive(key: str, value: Any, optional: bool = False) -> None:
    """Raise ConfigError unless ``value`` is a finite number above 0, or None if it is ``optional``."""
    positive = is_number(value) and value > 0
    expected = f"a number above 0{' or null' * optional}"
    require(positive or (optional and value is None), f"expected {expected}, found {quote(value)}", key)


def is_number(value: Any) -> TypeGuard[int | float]:
    """Return whether ``value`` is a finite number, of a size that a float can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
