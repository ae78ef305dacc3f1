"""Index scores and selection, in eager PyTorch (report eq. 13-17)."""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 24
"""Largest [B, s, heads, T] score block held at once by :func:`index_topk`."""


def index_scores(query: Tensor, keys: Tensor, head_weights: Tensor) -> Tensor:
    """``I[b, s, t] = sum_h head_weights[b, s, h] * relu(query[b, s, h] . keys[b, t])``; differentiable.

    query [B, S, h, c], keys [B, T, c], head_weights [B, S, h] (already scaled); float32 [B, S, T].
    """
    B, S, h, c = query.shape
    per_head = torch.bmm(query.reshape(B, S * h, c), keys.transpose(1, 2)).relu().view(B, S, h, -1)
    return torch.einsum("bsh,bsht->bst", head_weights, per_head).float()


def select_topk(scores: Tensor, permitted: Tensor, k: int) -> Tensor:
    """Indices of the ``k`` best permitted entries of every query: int64 [B, S, k], unused places -1.

    scores float32 [B, S, T]; permitted bool [B or 1, S, T], True where query s may use entry t.
    Ties go to the lower entry index, everywhere: ReLU makes exact ties at zero common, and prefill, chunked prefill
    and decode must choose alike.
    """
    T = scores.shape[-1]
    k_found = min(k, T)
    places = torch.arange(T, device=scores.device)
    scores = scores.detach().float().masked_fill(~permitted, float("-inf"))
    # One sortable integer per entry: the score's bits, made monotone, above the negated index.
    bits = (scores + 0.0).contiguous().view(torch.int32).to(torch.int64)  # + 0.0 turns -0.0 into 0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    keyed = ordered * (1 << 31) + (T - 1 - places)
    chosen = keyed.topk(k_found, dim=-1).indices
    chosen = chosen.masked_fill(~permitted.expand_as(scores).gather(-1, chosen), -1)
    if k_found < k:
        chosen = torch.nn.functional.pad(chosen, (0, k - k_found), value=-1)
    return chosen


def index_topk(query: Tensor, keys: Tensor, head_weights: Tensor, visible: Tensor, k: int) -> Tensor:
    """:func:`index_scores` and :func:`select_topk` over bounded pieces of the queries. No gradient.

    visible int64 [B or 1, S]: the number of entries, a prefix, that query s may use.
    """
    B, S, h, _ = query.shape
    places = torch.arange(keys.shape[1], device=keys.device)
    step = max(1, _CHUNK_ELEMENTS // max(1, B * h * keys.shape[1]))
    with torch.no_grad():
        pieces = [
            select_topk(
                index_scores(query[:, s : s + step], keys, head_weights[:, s : s + step]),
                places < visible[:, s : s + step].unsqueeze(-1),
                k,
            )
            for s in range(0, S, step)
        ]
    return torch.cat(pieces, dim=1)
