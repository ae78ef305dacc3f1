"""The indexer's loss by blocks of queries, with its gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.autocast import in_float32
from kernels.entry_ranges import EntryRanges
from kernels.index_scores.eager import score_gradients, scores_of
from kernels.indexer_kl.precomputed import mean, wants_gradients
from kernels.indexer_kl.reference import MIN_MASS
from kernels.sparse_attention.mass import EntryMass

_MAX_SCORES, _MAX_SCORES_ON_GPU = 1 << 22, 1 << 26
"""Maximum number of scores per block of several queries."""


@torch.no_grad()
def _sum(
    query: Tensor,
    keys: Tensor,
    head_weights: Tensor,
    mass: EntryMass,
    visible: EntryRanges,
    chosen: Tensor | None,
    has_gradients: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Return the sum over queries, and its gradients if wanted."""
    (B, S), T = query.shape[:2], keys.shape[1]
    total = query.new_zeros((), dtype=torch.float32)
    gradients = [torch.zeros_like(x, dtype=torch.float32) for x in (query, keys, head_weights)] if has_gradients else []
    step = max(1, (_MAX_SCORES if query.is_cpu else _MAX_SCORES_ON_GPU) // max(1, B * T))
    for begin in range(0, S, step):
        queries = slice(begin, begin + step)
        own = None if chosen is None else chosen[:, queries]
        permitted = visible.of(queries).mask(T) if own is None else own >= 0
        some = query[:, queries], keys, head_weights[:, queries], permitted, own
        scores, hidden = scores_of(*some), ~permitted
        teacher = mass.of(queries).masked_fill(hidden, 0.0)
        target = teacher / teacher.sum(-1, keepdim=True).clamp(min=MIN_MASS)
        log_choice = scores.masked_fill_(hidden, float("-inf")).log_softmax(-1).masked_fill_(hidden, 0.0)
        total += (torch.xlogy(target, target) - target * log_choice).sum()
        if has_gradients:
            upstream = (target.sum(-1, keepdim=True) * log_choice.exp_() - target).masked_fill_(hidden, 0.0)
            of_query, of_keys, of_weights = score_gradients(upstream, *some)
            gradients[0][:, queries], gradients[2][:, queries] = of_query, of_weights
            gradients[1] += of_keys
    return total, gradients


def indexer_kl(
    query: Tensor,
    keys: Tensor,
    head_weights: Tensor,
    mass: EntryMass,
    visible: EntryRanges,
    chosen: Tensor | None = None,
) -> Tensor:
    """Implement :func:`kernels.indexer_kl.indexer_kl`."""
    inputs = query, keys, head_weights
    with in_float32(query):
        total, gradients = _sum(*inputs, mass, visible, chosen, wants_gradients(*inputs))
        return mean(total, inputs, gradients, visible, chosen)
