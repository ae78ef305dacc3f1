"""Reading a prompt into a cache, in pieces."""

from __future__ import annotations

import torch
from torch import Tensor

from model.cache import Cache
from model.transformer import Transformer


@torch.inference_mode()
def prefill(model: Transformer, cache: Cache, input_ids: Tensor, chunk: int = 512) -> Tensor:
    """Append input_ids int64 [B, S >= 1] to ``cache``; returns the last token's logits, float32 [B, vocab].

    Memory grows with ``chunk``, not with S. Raises CacheError, before anything is changed, when S tokens do not fit.
    """
    cache.check_room(*input_ids.shape)
    for piece in input_ids.split(chunk, dim=1):
        logits = model(piece, cache, last_only=True)
    return logits[:, -1]
