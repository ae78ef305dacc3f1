"""The gated delta rule in PyTorch, one token after another."""

from __future__ import annotations

import torch
from torch import Tensor


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor | None = None,
    positions: Tensor | None = None,
    chunk_size: int = 32,
) -> tuple[Tensor, Tensor]:
    """Implement :func:`kernels.gated_delta_rule.gated_delta_rule`. ``chunk_size`` changes nothing."""
    if state is None:
        state = q.new_zeros(*q.shape[:1], *q.shape[2:], v.shape[3])
    outputs = []
    for t in range(q.shape[1]):
        if positions is not None:
            state = state.masked_fill((positions[:, t] == 0)[:, None, None, None], 0.0)
        state = g[:, t].exp().unsqueeze(-1) * state
        key = k[:, t].unsqueeze(-1)
        error = v[:, t] - (state * key).sum(-2)
        state = state + key * (beta[:, t].unsqueeze(-1) * error).unsqueeze(-2)
        outputs.append((state * q[:, t].unsqueeze(-1)).sum(-2))
    return torch.stack(outputs, dim=1), state
