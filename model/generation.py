"""Chunked prefill and greedy decoding."""

from __future__ import annotations

import torch
from torch import Tensor

from model.cache import Cache
from model.decode_graphs import DecodeGraphs
from model.forward.input_ids import check_ids
from model.transformer import Transformer


@torch.inference_mode()
def prefill(model: Transformer, cache: Cache, input_ids: Tensor, chunk: int = 512) -> Tensor:
    """Append input_ids int64 [B, S >= 1] to ``cache`` and return the last token's logits, float32 [B, vocab].

    Memory grows with ``chunk``, not with S. Raises CacheError if S tokens do not fit, and ValueError if the IDs have
    another shape or are outside the vocabulary or if ``chunk`` is not positive. The cache is then unchanged.
    """
    check_ids(input_ids)
    model.check_vocabulary(input_ids)
    if chunk < 1:
        raise ValueError(f"chunk: expected at least 1 token, found {chunk}")
    cache.check_room(*input_ids.shape)
    for piece in input_ids.split(chunk, dim=1):
        logits = model(piece, cache, last_only=True)
    return logits[:, -1]


def generate(
    model: Transformer, input_ids: Tensor, max_new_tokens: int, eos_id: int | None = None, cuda_graphs: bool = False
) -> Tensor:
    """Return the prompt and its greedy continuation: input_ids int64 [B, S >= 1] -> [B, S + n], n <= max_new_tokens.

    Each step takes the most likely token; ties take the lowest ID. Generation stops once every sequence has produced
    ``eos_id``; sequences that end earlier are padded with it. Decode steps are recorded and replayed
    (:mod:`model.decode_graphs`). On a GPU this requires ``cuda_graphs``: every call records its steps again, which pays
    only for long continuations (not measured). Raises CacheError if the S + max_new_tokens - 1 tokens that the model
    reads exceed its positions.
    """
    check_ids(input_ids)
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens: expected 0 or more, found {max_new_tokens}")
    if not max_new_tokens:
        return input_ids
    batch, length = input_ids.shape
    cache = Cache(model.config, batch, length + max_new_tokens - 1, device=input_ids.device)
    graphs = DecodeGraphs.if_supported(model, batch, cuda_graphs)
    tokens = [input_ids]
    with torch.inference_mode():
        ended = torch.zeros(batch, dtype=torch.bool, device=input_ids.device)
        logits = prefill(model, cache, input_ids)
        for step in range(max_new_tokens):
            if step:
                logits = (model(tokens[-1], cache) if graphs is None else graphs.logits(tokens[-1], cache))[:, -1]
            chosen = logits.argmax(dim=-1)
            if eos_id is not None:
                chosen = chosen.masked_fill(ended, eos_id)
                ended |= chosen == eos_id
            tokens.append(chosen.unsqueeze(1))
            if ended.all():
                break
    return torch.cat(tokens, dim=1)
