"""Measured bytes of an allocated and filled cache, and the growth of the process's resident memory."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psutil

from model.cache import Cache
from model.cache.random_fill import SPARE_BYTES, fill_random
from model.config import ModelConfig
from model.costs import cache_bytes_per_token, fixed_state_bytes
from model.errors import CacheError

BYTES_PER_TOKEN = "cache/bytes_per_token"
MEASURED_TOKENS = 65_536
MEASUREMENT_RULE = (
    "bytes of a cache allocated and filled with random entries; components: bytes of the storages, in whole pages; "
    "resident memory: growth of the process's memory, against the closed form of the total cache"
)


@dataclass(frozen=True)
class Measurement:
    """Bytes of one sequence's cache at ``tokens`` tokens."""

    tokens: int
    components: dict[str, tuple[int, float]]
    """(measured, closed form) by name."""
    resident: int
    """Growth of the process's resident memory."""

    @property
    def measured(self) -> int:
        return sum(measured for measured, _ in self.components.values())

    @property
    def closed_form(self) -> float:
        return sum(expected for _, expected in self.components.values())

    def rows(self) -> list[list[str]]:
        """Return name, closed form, measured bytes and their difference for every component and the total."""
        totals = {"total": self.measured, "resident memory": self.resident}
        pairs = self.components | {name: (measured, self.closed_form) for name, measured in totals.items()}
        return [
            [name, f"{expected:,.0f}", f"{measured:,}", f"{measured / expected - 1:+.2%}"]
            for name, (measured, expected) in pairs.items()
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        components = {
            name: {"measured": measured, "closed_form": expected}
            for name, (measured, expected) in self.components.items()
        }
        return {
            "rule": MEASUREMENT_RULE,
            "tokens": self.tokens,
            "components": components,
            "measured": self.measured,
            "closed_form": self.closed_form,
            "resident": self.resident,
        }


def check_memory(configs: Sequence[ModelConfig], tokens: int) -> None:
    """Raise CacheError if memory is short for a filled cache of each model at once, or a model does not allow the
    length."""
    needed = sum(Cache(config, 1, tokens, device="meta").nbytes() for config in configs)
    available = psutil.virtual_memory().available
    if needed + SPARE_BYTES > available:
        if len(configs) == 1:
            caches, takes, them = "a cache", "takes", "it"
        else:
            caches, takes, them = f"{len(configs)} caches", "take", "them"
        raise CacheError(
            f"{caches} of {tokens:,} tokens {takes} {needed:,} bytes, and filling {them} up to {SPARE_BYTES:,} more, "
            f"but {available:,} bytes of memory are available"
        )


def measure_cache(config: ModelConfig, tokens: int) -> Measurement:
    """Allocate and fill the cache of one sequence of ``tokens`` tokens, and measure it.

    Raises CacheError, before anything is allocated, if memory is short or the model does not allow the length.
    """
    check_memory([config], tokens)
    fill_random(Cache(config, 1, 1), 1)  # warm up: code loaded by the first use would count otherwise
    before = _resident()
    cache = Cache(config, 1, tokens)
    fill_random(cache, tokens)
    resident = _resident() - before
    expected = {name: size * tokens for name, size in cache_bytes_per_token(config).items()} | fixed_state_bytes(config)
    components = {name: (cache.nbytes(name), size) for name, size in expected.items() if size}
    return Measurement(tokens, components, resident)


def _resident() -> int:
    """Return the resident bytes of this process, after glibc has returned its free memory."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return psutil.Process().memory_info().rss


def measured_cache(config: ModelConfig) -> dict[str, float]:
    """Return metrics of one sequence's cache, allocated for MEASURED_TOKENS tokens or the model's maximum."""
    cache = Cache(config, 1, min(MEASURED_TOKENS, config.max_positions))
    return {BYTES_PER_TOKEN: cache.bytes_per_token(), "cache/measured_tokens": float(cache.max_tokens)}
