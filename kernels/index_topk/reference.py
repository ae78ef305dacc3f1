"""Index scores and selection, in eager PyTorch (report eq. 13-17)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_GROUP = 16
"""Neighbouring entries that are first compared by their best score alone."""


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
    return best_places(scores.detach().float().masked_fill(~permitted, float("-inf")), k)


def best_places(scores: Tensor, k: int) -> Tensor:
    """The ``k`` best of float32 [..., T], in order, the lower place first among equals: int64 [..., k].

    ``-inf`` is never chosen; unused places are -1.
    """
    T = scores.shape[-1]
    if 4 * _GROUP * k < T:
        # The best k lie in the k groups whose best is best: whatever lies elsewhere has k better ones before it.
        groups = F.pad(scores, (0, -T % _GROUP), value=float("-inf")).unflatten(-1, (-1, _GROUP))
        best_groups = _ordered_topk(groups.amax(-1), k).sort(-1).values
        places = (best_groups.unsqueeze(-1) * _GROUP + torch.arange(_GROUP, device=scores.device)).flatten(-2)
        candidates = groups.flatten(-2).gather(-1, places)
        inner = _ordered_topk(candidates, k)
        chosen, values = places.gather(-1, inner), candidates.gather(-1, inner)
    else:
        chosen = _ordered_topk(scores, min(k, T))
        values = scores.gather(-1, chosen)
    return F.pad(chosen.masked_fill(values == float("-inf"), -1), (0, k - chosen.shape[-1]), value=-1)


def _ordered_topk(scores: Tensor, k: int) -> Tensor:
    """Places of the ``k`` largest, the lower first among equals: torch.topk promises no order there."""
    # One sortable integer per entry: the score's bits, made monotone, above the negated place.
    bits = (scores + 0.0).view(torch.int32).to(torch.int64)  # + 0.0 turns -0.0 into 0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    places = torch.arange(scores.shape[-1], device=scores.device)
    return (ordered * (1 << 31) - places).topk(k, dim=-1).indices
