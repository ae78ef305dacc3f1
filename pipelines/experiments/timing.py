"""Times of decoding and prefill on this machine, with random weights and entries."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence

import torch

from model.cache import Cache
from model.cache.random_fill import fill_random
from model.config import ModelConfig
from model.generation import prefill
from model.machine import Machine
from model.transformer import Transformer
from model.wording import count

_ROUNDS = 5
DECODED = _ROUNDS + 1
"""Number of tokens that :func:`time_decoding` decodes after each length."""


def describe_machine() -> str:
    """Return a note on the machine and the method."""
    threads = count(torch.get_num_threads(), "thread")
    method = f"networks take turns, medians of {_ROUNDS}; random weights and cache entries"
    return f"{Machine.here().title}, {threads}; {method}"


@torch.inference_mode()
def time_decoding(configs: Mapping[str, ModelConfig], lengths: Sequence[int]) -> dict[str, list[float]]:
    """Return the seconds per decoded token of each network behind ``lengths`` tokens. Networks take turns."""
    models = {name: Transformer(config).eval() for name, config in configs.items()}
    found: dict[str, list[float]] = {name: [] for name in configs}
    token = torch.zeros((1, 1), dtype=torch.int64)
    for length in lengths:
        caches = {name: Cache(config, 1, length + DECODED) for name, config in configs.items()}
        for cache in caches.values():
            fill_random(cache, length)
        times: dict[str, list[float]] = {name: [] for name in configs}
        for _ in range(DECODED):
            for name, model in models.items():
                started = time.perf_counter()
                model(token, caches[name], last_only=True)
                times[name].append(time.perf_counter() - started)
        for name, seconds in times.items():
            found[name].append(statistics.median(seconds[1:]))  # the first one warms up
    return found


def time_prefill(configs: Mapping[str, ModelConfig], lengths: Sequence[int], longest: int) -> dict[str, list]:
    """Return the seconds of a prompt of each of ``lengths`` tokens per network; None for prompts above ``longest``.

    The median of ``_ROUNDS`` rounds after a warm-up round. Networks take turns within a round.
    """
    models = {name: Transformer(config).eval() for name, config in configs.items()}
    found: dict[str, list[float | None]] = {name: [] for name in configs}
    for length in lengths:
        prompt = torch.zeros((1, length), dtype=torch.int64)
        times: dict[str, list[float]] = {name: [] for name in configs}
        for _ in range(_ROUNDS + 1 if length <= longest else 0):
            for name, model in models.items():
                cache = Cache(model.config, 1, length)
                started = time.perf_counter()
                prefill(model, cache, prompt)
                times[name].append(time.perf_counter() - started)
        for name, seconds in times.items():
            found[name].append(statistics.median(seconds[1:]) if seconds else None)
    return found
