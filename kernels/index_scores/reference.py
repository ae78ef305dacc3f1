"""Index scores in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.autocast import in_float32


def index_scores(
    query: Tensor, keys: Tensor, head_weights: Tensor, permitted: Tensor | None = None, chosen: Tensor | None = None
) -> Tensor:
    """Implement :func:`kernels.index_scores.index_scores`."""
    B, S, h, c = query.shape
    with in_float32(query):
        per_head = torch.bmm(query.reshape(B, S * h, c).float(), keys.float().transpose(1, 2)).relu().view(B, S, h, -1)
        scores = torch.einsum("bsh,bsht->bst", head_weights.float(), per_head)
        return scores if chosen is None else scores.gather(-1, chosen.clamp(min=0).long())
