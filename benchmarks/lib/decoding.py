"""Decoding as :func:`model.generation.generate` does it: by recorded steps where the network supports them."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from torch import Tensor

from model.cache import Cache
from model.decode_graphs import DecodeGraphs
from model.transformer import Transformer

_graphs: WeakKeyDictionary[Cache, dict[Transformer, DecodeGraphs | None]] = WeakKeyDictionary()


def next_logits(model: Transformer, token: Tensor, cache: Cache) -> Tensor:
    """Append a token to every sequence, int64 [B, 1], in inference mode. Return the logits of the next one, float32
    [B, 1, vocab]."""
    of_model = _graphs.setdefault(cache, {})
    if model not in of_model:
        of_model[model] = DecodeGraphs.if_supported(model, cache.batch_size)
    graphs = of_model[model]
    return model(token, cache) if graphs is None else graphs.logits(token, cache)
