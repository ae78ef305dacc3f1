"""The state-space scan in PyTorch, one token after another."""

from __future__ import annotations

import torch
from torch import Tensor


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    state: Tensor | None = None,
    positions: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Implement :func:`kernels.ssd_scan.ssd_scan`. ``chunk_size`` changes nothing."""
    heads = x.shape[2]
    B, C = (z.repeat_interleave(heads // z.shape[2], dim=2) for z in (B, C))
    if state is None:
        state = x.new_zeros(*x.shape[:1], *x.shape[2:], B.shape[-1])
    outputs = []
    for t in range(x.shape[1]):
        if positions is not None:
            state = state.masked_fill((positions[:, t] == 0)[:, None, None, None], 0.0)
        decay = torch.exp(dt[:, t] * A)[..., None, None]
        state = decay * state + (dt[:, t, :, None] * x[:, t]).unsqueeze(-1) * B[:, t].unsqueeze(-2)
        outputs.append((state * C[:, t].unsqueeze(-2)).sum(-1) + D[:, None] * x[:, t])
    return torch.stack(outputs, dim=1), state
