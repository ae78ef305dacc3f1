"""Checks of mixer options, and settings that recurrent mixers share."""

from __future__ import annotations

from typing import Any

import torch

from model.mixers.base import require

STATE_FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Formats of recurrent states and of the tokens kept for a convolution."""


def check_count(key: str, value: Any, least: int = 1) -> None:
    """Raise ConfigError unless the option ``key`` is a whole number of at least ``least``."""
    counts = type(value) is int and least <= value < 1 << 31
    require(counts, f"{key}: expected a whole number of at least {least}, found {value!r}")


def check_state_format(key: str, value: Any) -> None:
    """Raise ConfigError unless the option ``key`` names one of :data:`STATE_FORMATS`."""
    known = isinstance(value, str) and value in STATE_FORMATS
    require(known, f"{key}: expected one of {', '.join(STATE_FORMATS)}, found {value!r}")
