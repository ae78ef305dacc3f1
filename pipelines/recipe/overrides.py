"""``key=value`` settings of the command line.

A text setting takes its value as typed, and a list of text either one value as typed or ``[a, b]``. Other values are
YAML. ``null`` unsets an optional setting.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from model.errors import ConfigError
from model.wording import quote
from pipelines.recipe.key_types import is_list_of_text, is_optional, is_text, type_of
from pipelines.recipe.keys import merge, set_key
from pipelines.recipe.yaml_format import parse_yaml


def parse_override(override: str) -> tuple[str, Any]:
    """Return the dotted key and the value of ``key=value``. Raises ConfigError."""
    key, _, text = override.partition("=")
    try:
        return key, _parse_value(type_of(key), text)
    except ConfigError as error:
        raise ConfigError(f"{key}: cannot be set to {quote(text)} ({error})") from None


def _parse_value(annotation: Any, text: str) -> Any:
    if text == "null" and is_optional(annotation):
        return None
    if is_text(annotation):
        return text
    if is_list_of_text(annotation):
        return parse_yaml(text, scalars_as_text=True) if text.startswith("[") and text.endswith("]") else [text]
    return parse_yaml(text)


def nested(overrides: Sequence[str]) -> dict[str, Any]:
    """Return ``key=value`` overrides as nested mappings. Later ones win. Raises ConfigError."""
    values: dict[str, Any] = {}
    for override in overrides:
        key, value = parse_override(override)
        own: dict[str, Any] = {}
        set_key(own, key, value)
        try:
            values = merge(values, own)
        except ConfigError as error:
            raise ConfigError(f"{key}: cannot be set to {quote(value)} ({error.reason})") from None
    return values
