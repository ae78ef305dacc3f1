"""Typed access to the keys of a ``config.json``."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model.config import MAX_LAYERS, ModelConfig
from model.errors import CheckpointError, ConfigError
from model.mixers.options import is_number
from model.wording import quote_json


class ConfigReader:
    """Keys of one file. Errors name the key, the expected and the found value."""

    def __init__(self, path: Path, content: dict[str, Any]):
        self.path, self.content = path, content

    def error(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {message}")

    def wrong(self, key: str, expected: str, found: Any) -> CheckpointError:
        return self.error(f"key '{key}': expected {expected}, found {quote_json(found)}")

    def missing(self, *keys: str) -> CheckpointError:
        """Return the error for a key, or for alternative keys, none of which exists. It names the same keys of inner
        objects."""
        nested = [
            f"'{outer}.{key}'"
            for key in keys
            for outer, inner in self.content.items()
            if isinstance(inner, dict) and inner.get(key) is not None
        ]
        named = " and ".join(f"'{key}'" for key in keys)
        text = f"key {named} is missing" if len(keys) == 1 else f"keys {named} are both missing"
        return self.error(text + (f" at the top level; there is {', '.join(nested)}" if nested else ""))

    def has(self, key: str) -> bool:
        """Return whether the key exists and is not null."""
        return self.content.get(key) is not None

    def require(self, key: str) -> Any:
        if not self.has(key):
            raise self.missing(key)
        return self.content[key]

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.require(key) if default is None else self.content.get(key, default)
        if type(value) is not int:
            raise self.wrong(key, "a whole number", value)
        return value

    def layer_count(self) -> int:
        """Return ``num_hidden_layers``, checked before anything is listed per layer."""
        count = self.integer("num_hidden_layers")
        if not 1 <= count <= MAX_LAYERS:
            raise self.wrong("num_hidden_layers", f"1 to {MAX_LAYERS} layers", count)
        return count

    def number(self, key: str, mapping: dict[str, Any] | None = None, inside: str = "") -> float:
        value = self.require(key) if mapping is None else mapping.get(key)
        if not is_number(value):
            raise self.wrong(f"{inside}{key}", "a number", value)
        return float(value)

    def items(self, key: str) -> list[Any]:
        value = self.require(key)
        if not isinstance(value, list):
            raise self.wrong(key, "a list", value)
        return value

    def mapping(self, key: str) -> dict[str, Any]:
        """Return the object under ``key``; empty if the key is missing."""
        value = self.content.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self.wrong(key, "an object", value)
        return value

    def one_per_layer(self, key: str, layers: int, known: tuple[str, ...]) -> list[str]:
        """Return the list of names under ``key``, one of ``known`` for each layer."""
        names = self.items(key)
        if len(names) != layers:
            raise self.error(
                f"key '{key}': has {len(names)} entries, but 'num_hidden_layers' is {layers}; correct either of them"
            )
        for layer, name in enumerate(names):
            if not isinstance(name, str) or name not in known:
                raise self.wrong(f"{key}[{layer}]", f"one of {', '.join(known)}", name)
        return names

    def leading(self, key: str, layers: int, first: str, rest: str) -> int:
        """Return the number of leading ``first`` entries in the list under ``key``. All later entries must be
        ``rest``."""
        names = self.one_per_layer(key, layers, (first, rest))
        count = names.count(first)
        if first in names[count:]:
            layer = names.index(first, count)
            raise self.error(f"key '{key}': entry {layer} (from 0) is '{first}' after a '{rest}' entry")
        return count

    def refuse_quantization(self) -> None:
        """Raise CheckpointError if the weights are quantized."""
        if self.has("quantization_config"):
            raise self.error(
                "key 'quantization_config': quantized weights are not supported, convert them to BF16 first"
            )

    def fixed(self, values: Mapping[str, Any]) -> None:
        """Check keys of which the network implements one value, which is also the default."""
        for key, expected in values.items():
            if self.content.get(key, expected) != expected:
                raise self.wrong(key, json.dumps(expected), self.content[key])

    def build(self, fields: dict[str, Any], key_of: Mapping[str, str]) -> ModelConfig:
        """Return the configuration with these fields. Errors use the file's keys, ``key_of`` our names."""

        def key(match: re.Match[str]) -> str:
            return key_of.get(match[0], match[0])

        try:
            return ModelConfig.from_dict(fields)
        except ConfigError as error:
            name, _, rest = str(error).partition(":")
            message = re.sub(r"\b[a-z]+(_[a-z]+)+\b", key, rest)
            raise self.error(f"key '{key_of.get(name, name)}':{message}") from error
