"""Compiling before the first request instead of during it."""

from __future__ import annotations

import torch

from model.cache import Cache
from model.cache_filling import fill_random
from model.execution import COMPILED_TILES
from model.transformer import Transformer

_SHORTEST = 64
"""Below it nothing differs."""


@torch.inference_mode()
def warm_up(model: Transformer, tokens: int, chunk: int = 512) -> None:
    """Have all code compiled that one sequence of up to ``tokens`` tokens needs, its prompt read in pieces of at most
    ``chunk``, on as many threads as are set now. Takes minutes the first time, and does nothing in other modes.

    Code is made for few sizes, which double with the length: each is met once, after random entries. Raises CacheError
    for more tokens than the model allows.
    """
    if not model.execution.compiled:
        return
    Cache(model.config, 1, tokens, "meta")  # refused now instead of after minutes
    device = next(model.parameters()).device

    def read(size: int, before: int, last_only: bool) -> None:
        cache = Cache(model.config, 1, before + size, device)
        if before:
            fill_random(cache, before)
        model(torch.zeros(1, size, dtype=torch.int64, device=device), cache, last_only=last_only)

    for size in (*COMPILED_TILES, chunk):  # from nothing, and with all logits, no length makes a difference
        read(min(size, chunk, tokens), 0, last_only=False)
    length = min(_SHORTEST, tokens)
    while True:
        for size in {min(size, chunk, length) for size in (*COMPILED_TILES, chunk)}:
            read(size, length - size, last_only=True)
        if length == tokens:
            return
        length = min(2 * length, tokens)
