"""Index scores and selection, in eager PyTorch (report eq. 13-17)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.autocast import in_float32

_MANY = 32
"""So many times more scores than are chosen are worth looking through in two steps."""


def index_scores(query: Tensor, keys: Tensor, head_weights: Tensor, permitted: Tensor | None = None) -> Tensor:
    """``I[b, s, t] = sum_h head_weights[b, s, h] * relu(query[b, s, h] . keys[b, t])``; differentiable.

    query [B, S, h, c], keys [B, T, c], head_weights [B, S, h] (already scaled); float32 [B, S, T]. Where ``permitted``,
    bool [B or 1, S, T], is False, a score means nothing: some backends leave it out. In float32 under autocast, too:
    choices would differ from those of inference.
    """
    B, S, h, c = query.shape
    with in_float32(query):
        per_head = torch.bmm(query.reshape(B, S * h, c).float(), keys.float().transpose(1, 2)).relu().view(B, S, h, -1)
        return torch.einsum("bsh,bsht->bst", head_weights.float(), per_head)


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
    if T // k < _MANY:
        places = torch.arange(T, device=scores.device)
        chosen = _keys(scores, places).topk(min(k, T), dim=-1).indices
        values = scores.gather(-1, chosen)
    else:
        # The best k lie in the k groups of neighbours whose best is best: whatever lies elsewhere has k better ones
        # before it. This size takes the fewest comparisons.
        size = 1 << (T // k).bit_length() // 2
        groups = F.pad(scores, (0, -T % size), value=float("-inf")).unflatten(-1, (-1, size))
        places = torch.arange(groups.shape[-2], device=scores.device)
        best = _keys(groups.amax(-1), places).topk(k, dim=-1, sorted=False).indices
        candidates = (best.unsqueeze(-1) * size + places[:size]).flatten(-2)
        values = groups.flatten(-2).gather(-1, candidates)
        inner = _keys(values, candidates).topk(k, dim=-1).indices
        chosen, values = candidates.gather(-1, inner), values.gather(-1, inner)
    return F.pad(chosen.masked_fill(values == float("-inf"), -1), (0, k - chosen.shape[-1]), value=-1)


def _keys(scores: Tensor, places: Tensor) -> Tensor:
    """One integer for each score, int64, in the scores' order and the lower place above among equals: torch.topk
    promises no order there."""
    bits = (scores + 0.0).view(torch.int32).to(torch.int64)  # + 0.0 turns -0.0 into 0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return ordered * (1 << 31) - places
