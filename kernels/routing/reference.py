"""Routing in PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

SCORINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "sqrtsoftplus": lambda logits: F.softplus(logits).sqrt(),
    "sigmoid": lambda logits: logits.sigmoid(),
}
SUM_EPS = 1e-20
"""Added to the sum of affinities, which can be zero."""

VECTOR_ELEMENTS = 32
"""Elements per iteration of PyTorch's vectorized CPU loops. A remainder runs scalar code, which rounds differently."""


def affinity(logits: Tensor, scoring: str) -> Tensor:
    """Return the affinities of experts with these router logits, float32 of the same shape, at least 0.

    Without gradients, a token's affinities have the same bits in any batch.
    """
    experts = logits.shape[-1]
    if logits.requires_grad or experts % VECTOR_ELEMENTS == 0:
        return SCORINGS[scoring](logits)
    return SCORINGS[scoring](F.pad(logits, (0, -experts % VECTOR_ELEMENTS)))[..., :experts]


def route(
    logits: Tensor,
    bias: Tensor,
    k: int,
    scale: float,
    chosen: Tensor | None = None,
    scoring: str = "sqrtsoftplus",
    groups: int = 1,
    groups_per_token: int = 1,
) -> tuple[Tensor, Tensor]:
    """Implement :func:`kernels.routing.route`."""
    affinities = affinity(logits, scoring)
    if chosen is None:
        scores = affinities.detach() + bias
        if groups_per_token < groups:
            scores = _within_best_groups(scores, groups, groups_per_token)
        chosen = scores.topk(k, dim=-1).indices
    weights = affinities.gather(-1, chosen)
    return chosen, weights / (weights.sum(-1, keepdim=True) + SUM_EPS) * scale


def _within_best_groups(scores: Tensor, groups: int, best: int) -> Tensor:
    """Replace scores [..., E] outside the ``best`` groups by -inf. A group's score is the sum of its two best."""
    grouped = scores.unflatten(-1, (groups, -1))
    kept = grouped.topk(2, dim=-1).values.sum(-1).topk(best, dim=-1).indices
    hidden = grouped.new_ones(grouped.shape[:-1]).scatter(-1, kept, 0).bool()
    return grouped.masked_fill(hidden.unsqueeze(-1), float("-inf")).flatten(-2)
