"""YAML as recipes use it: plain values without dates, base 60, leading-zero octals or interpolation.

Numbers may have an exponent without a point (``1e-3``), which YAML 1.1 reads as text. Keys must be text and unique.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from model.errors import ConfigError
from model.wording import quote

MAX_DEPTH = 32
MAX_VALUES = 100_000
"""Limits on the parsed content, in which an alias counts as often as it is used."""

_INT = re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0o[0-7_]+)$")
_FLOAT = re.compile(
    r"""(?:[-+]?(?:[0-9][0-9_]*)\.[0-9_]*(?:[eE][-+]?[0-9]+)?
    |[-+]?(?:[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)
    |[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
    |[-+]?\.(?:inf|Inf|INF)
    |\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)
_PLACE = re.compile('"<(?:unicode|byte) string>", ')
"""PyYAML's name of a file that it is given as text or bytes."""
_REPLACED = {f"tag:yaml.org,2002:{name}" for name in ("int", "float", "timestamp")}


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        if isinstance(node, yaml.MappingNode):
            seen = set()
            for key_node, _ in node.value:
                if key_node.tag == "tag:yaml.org,2002:merge":
                    continue
                key = self.construct_object(key_node, deep=True)
                if not isinstance(key, str):
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {quote(key)} is not text; put it in quotes", key_node.start_mark
                    )
                if key in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key!r}", key_node.start_mark)
                seen.add(key)
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    """Quote text with characters that are not printable: PyYAML reads some of them, such as U+0085, as line breaks."""
    style = None if text.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


class _TextLoader(yaml.BaseLoader):
    """Reads every scalar as text."""


for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _class.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))  # type: ignore[no-untyped-call]
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))  # type: ignore[no-untyped-call]


def parse_yaml(text: str | bytes, scalars_as_text: bool = False) -> Any:
    """Return the value that ``text`` holds. Raises ConfigError with the reason alone.

    Args:
        scalars_as_text: Read ``007``, ``on`` and ``null`` as text, too.
    """
    try:
        value = yaml.load(text, Loader=_TextLoader if scalars_as_text else _Loader)
    except RecursionError:
        raise ConfigError("nested too deeply") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise ConfigError(" ".join(_PLACE.sub("", str(error)).split())) from None
    _check_plain(value)
    return value


def dump_yaml(value: Any) -> str:
    """Return ``value`` as YAML that :func:`parse_yaml` reads back."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _check_plain(value: Any) -> None:
    """Raise ConfigError for sets, dates and binary data, and for cyclic or huge content, as a few aliases can make."""
    pending, count = [(value, 0)], 0
    while pending:
        item, depth = pending.pop()
        count += 1
        if depth > MAX_DEPTH:
            raise ConfigError("nested too deeply")
        if count > MAX_VALUES:
            raise ConfigError(f"holds more than {MAX_VALUES:,} values")
        if not isinstance(item, dict | list | str | int | float | None):
            raise ConfigError(f"holds a {type(item).__name__}; expected text, numbers, booleans, lists and mappings")
        inner = item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
        pending += [(part, depth + 1) for part in inner]
