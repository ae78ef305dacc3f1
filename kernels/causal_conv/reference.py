"""Short causal convolutions in PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, tail: Tensor | None = None, positions: Tensor | None = None
) -> Tensor:
    """Implement :func:`kernels.causal_conv.causal_conv`, without the next tail."""
    S, kept = x.shape[1], weight.shape[1] - 1
    before = x.new_zeros(x.shape[0], kept, x.shape[2]) if tail is None else tail
    rows = torch.cat((before, x), dim=1)
    out = x * weight[:, kept]
    for distance in range(1, kept + 1):
        earlier = rows[:, kept - distance : kept - distance + S]
        if positions is not None:
            earlier = earlier.masked_fill((positions < distance).unsqueeze(-1), 0.0)
        out = out + earlier * weight[:, kept - distance]
    return F.silu(out if bias is None else out + bias)
