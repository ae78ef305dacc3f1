"""Reading a prompt into a cache, in pieces, and going on from it greedily."""

from __future__ import annotations

import torch
from torch import Tensor

from model.cache import Cache
from model.transformer import Transformer, check_ids


@torch.inference_mode()
def prefill(model: Transformer, cache: Cache, input_ids: Tensor, chunk: int = 512) -> Tensor:
    """Append input_ids int64 [B, S >= 1] to ``cache``; returns the last token's logits, float32 [B, vocab].

    Memory grows with ``chunk``, not with S. Raises CacheError, before anything is changed, when S tokens do not fit;
    ValueError, as early, for ids of another shape or outside the vocabulary, and for a chunk of no tokens.
    """
    check_ids(input_ids)
    model.check_vocabulary(input_ids)
    if chunk < 1:
        raise ValueError(f"chunk: expected at least 1 token, found {chunk}")
    cache.check_room(*input_ids.shape)
    for piece in input_ids.split(chunk, dim=1):
        logits = model(piece, cache, last_only=True)
    return logits[:, -1]


def generate(model: Transformer, input_ids: Tensor, max_new_tokens: int, eos_id: int | None = None) -> Tensor:
    """The prompt and its greedy continuation: input_ids int64 [B, S >= 1] -> [B, S + n], n <= max_new_tokens.

    Every step takes the likeliest token, the lowest id of several. It ends early when every sequence has produced
    ``eos_id``; one that ended sooner goes on with ``eos_id``. Raises CacheError when S + max_new_tokens - 1 tokens, as
    many as are ever read, exceed the model's positions.
    """
    check_ids(input_ids)
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens: expected 0 or more, found {max_new_tokens}")
    if not max_new_tokens:
        return input_ids
    batch, length = input_ids.shape
    cache = Cache(model.config, batch, length + max_new_tokens - 1, device=input_ids.device)
    tokens = [input_ids]
    with torch.inference_mode():
        ended = torch.zeros(batch, dtype=torch.bool, device=input_ids.device)
        logits = prefill(model, cache, input_ids)
        for step in range(max_new_tokens):
            if step:
                logits = model(tokens[-1], cache, last_only=True)[:, -1]
            chosen = logits.argmax(dim=-1)
            if eos_id is not None:
                chosen = chosen.masked_fill(ended, eos_id)
                ended |= chosen == eos_id
            tokens.append(chosen.unsqueeze(1))
            if ended.all():
                break
    return torch.cat(tokens, dim=1)
