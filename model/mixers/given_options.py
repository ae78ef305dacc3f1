"""``mixer_options`` of a configuration: checks and defaults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from model.errors import ConfigError
from model.mixers import MIXERS
from model.mixers.base import Mixer
from model.wording import quote


def complete_options(given: Any, mixers: Sequence[type[Mixer]]) -> dict[str, dict[str, Any]]:
    """Return the options of ``mixers`` that have any, with defaults filled in.

    Options of other mixers are checked by :meth:`Mixer.check_options` and dropped: an override may have replaced the
    layers of a preset. Raises ConfigError.
    """
    check_option_names(given)
    used = [mixer.name for mixer in dict.fromkeys(mixers) if mixer.options]
    filled = {}
    for name in dict.fromkeys([*used, *given]):
        values = {**MIXERS[name].options, **given.get(name, {})}
        # JSON knows no tuples: with lists, a configuration equals the one that is read back from a checkpoint.
        filled[name] = {key: list(value) if isinstance(value, list | tuple) else value for key, value in values.items()}
        MIXERS[name].check_options(filled[name], f"mixer_options.{name}")
    return {name: filled[name] for name in used}


def check_option_names(given: Any) -> None:
    """Raise ConfigError for ``mixer_options`` of an unknown mixer, and for unknown options."""
    if not isinstance(given, Mapping):
        raise ConfigError(f"mixer_options: expected a mapping, found {quote(given)}")
    for name, values in given.items():
        if name not in MIXERS:
            raise ConfigError(f"mixer_options.{name}: unknown mixer; there are {', '.join(MIXERS)}")
        if not isinstance(values, Mapping):
            raise ConfigError(f"mixer_options.{name}: expected a mapping, found {quote(values)}")
        for key in values:
            if key not in MIXERS[name].options:
                known = ", ".join(MIXERS[name].options) or "none"
                raise ConfigError(f"mixer_options.{name}.{key}: unknown option; there are {known}")
