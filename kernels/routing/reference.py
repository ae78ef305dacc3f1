"""Routing in PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def route(logits: Tensor, bias: Tensor, k: int, scale: float, chosen: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Implement :func:`kernels.routing.route`."""
    affinity = F.softplus(logits).sqrt()
    if chosen is None:
        chosen = (affinity.detach() + bias).topk(k, dim=-1).indices
    weights = affinity.gather(-1, chosen)
    return chosen, weights / weights.sum(-1, keepdim=True) * scale
