"""Values and counts in messages. A value of a recipe is quoted as in YAML, a value of a JSON file or request as in
JSON."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping

_MAX_TEXT, _MAX_DIGITS, _MAX_JSON = 200, 40, 100
TYPE_NAMES: Mapping[type, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list",
    dict: "a mapping",
}
"""Types of settings, as messages expect them."""


class _Yaml(reprlib.Repr):
    """Python's notation, shortened, with YAML's words."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = _MAX_TEXT
        self.maxlong = _MAX_DIGITS

    def repr_NoneType(self, value: None, level: int) -> str:
        return "null"

    def repr_bool(self, value: bool, level: int) -> str:
        return "true" if value else "false"

    def repr_float(self, value: float, level: int) -> str:
        return repr(value).replace("inf", ".inf").replace("nan", ".nan")

    def repr_tuple(self, value: tuple, level: int) -> str:
        return self.repr_list(list(value), level)


def quote(value: object) -> str:
    """Return a value of a recipe, shortened."""
    return _Yaml().repr(value)


def quote_json(value: object) -> str:
    """Return a value read from JSON. The middle of long ones is left out; long lists and objects are only named."""
    text, half = json.dumps(value), _MAX_JSON // 2
    if len(text) <= _MAX_JSON:
        return text
    return json_type(value) if isinstance(value, list | dict) else f"{text[: half - 1]}…{text[-half:]}"


def json_type(value: object) -> str:
    """Return the type of a value read from JSON, with its article."""
    if value is None:
        return "null"
    names = {bool: "a boolean", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), "a number")


def count(number: float, noun: str) -> str:
    """Return a number with its noun, whose plural takes an s."""
    text = f"{number:,}" if isinstance(number, int) else f"{number:g}"
    return f"{text} {noun}" + ("" if number == 1 else "s")
