"""Dotted keys in nested mappings."""

from __future__ import annotations

from typing import Any

from model.errors import ConfigError


def get_key(values: Any, key: str) -> Any:
    """Return the value of a dotted key in nested mappings, or None."""
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def set_key(values: dict[str, Any], key: str, value: Any) -> None:
    """Replace the value of a dotted key in nested mappings and lists. Raises ConfigError."""
    *parents, last = key.split(".")
    target: Any = values
    for part in parents:
        index = _index(target, part, key)
        if isinstance(target, dict) and target.get(part) is None:
            target[part] = {}
        target = target[index]
    target[_index(target, last, key)] = value


def _index(target: Any, part: str, key: str) -> str | int:
    """Return the index of one part of ``key`` in a mapping or a list. Raises ConfigError."""
    if isinstance(target, dict) and part:
        return part
    if isinstance(target, list) and part.isdecimal() and len(part) < 9 and int(part) < len(target):
        return int(part)
    raise ConfigError(f"{key}: unknown key")


def merge(earlier: Any, later: Any, key: str = "") -> Any:
    """Return ``later`` merged over ``earlier``: mappings key by key, other values as a whole.

    Raises ConfigError where one holds a mapping and the other does not.
    """
    if isinstance(earlier, dict) and isinstance(later, dict):
        prefix = f"{key}." if key else ""
        merged = dict(earlier)
        for name, value in later.items():
            merged[name] = merge(earlier[name], value, prefix + name) if name in earlier else value
        return merged
    if isinstance(earlier, dict) != isinstance(later, dict) and None not in (earlier, later):
        raise _conflict(key, earlier, later)
    return later


def _conflict(key: str, earlier: Any, later: Any) -> ConfigError:
    """Return the error for merging a mapping with another value at the dotted ``key``. Its ``field`` is the key that
    ``later`` sets."""
    if isinstance(earlier, dict):
        return ConfigError(f"is a section, whose settings have keys such as {key}.{next(iter(earlier), 'name')}", key)
    named = key
    if isinstance(earlier, list) and not all(name.isdecimal() for name in later):
        return ConfigError("expected a list", key)
    while isinstance(later, dict) and len(later) == 1:
        name, later = next(iter(later.items()))
        named = f"{named}.{name}"
    kind = "list, which is set as a whole" if isinstance(earlier, list) else "single value, without settings in it"
    return ConfigError(f"{key} is a {kind}", named)
