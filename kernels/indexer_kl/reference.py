"""The indexer's loss in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.entry_ranges import EntryRanges
from kernels.index_scores.reference import index_scores
from kernels.sparse_attention.mass import EntryMass

MIN_MASS = 1e-20
"""Floor of the sum that the teacher is divided by."""


def indexer_kl(
    query: Tensor,
    keys: Tensor,
    head_weights: Tensor,
    mass: EntryMass,
    visible: EntryRanges,
    chosen: Tensor | None = None,
) -> Tensor:
    """Implement :func:`kernels.indexer_kl.indexer_kl`."""
    permitted = visible.mask(keys.shape[1]) if chosen is None else chosen >= 0
    scores = index_scores(query, keys, head_weights, permitted, chosen)
    teacher = mass.of().to(scores.dtype).masked_fill(~permitted, 0.0)
    target = teacher / teacher.sum(-1, keepdim=True).clamp(min=MIN_MASS)
    log_choice = scores.masked_fill(~permitted, float("-inf")).log_softmax(-1).masked_fill(~permitted, 0.0)
    divergence = (torch.xlogy(target, target) - target * log_choice).sum(-1)
    counted = permitted.any(-1).expand_as(divergence)
    return divergence.masked_fill(~counted, 0.0).sum() / counted.sum().clamp(min=1)
