"""Rotary position embedding in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """Implement :func:`kernels.rotary.rotate`."""
    cos, sin = broadcastable(cos, x), broadcastable(-sin if inverse else sin, x)
    dim = 2 * cos.shape[-1]
    even, odd = x[..., -dim::2], x[..., x.shape[-1] - dim + 1 :: 2]
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
    return rotated if dim == x.shape[-1] else torch.cat((x[..., :-dim], rotated), dim=-1)


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (k, k + r) of the first ``2 * r`` dims of x; other dims are unchanged.

    Args and result are as in :func:`kernels.rotary.rotate`.
    """
    cos, sin = broadcastable(cos, x), broadcastable(sin, x)
    r = cos.shape[-1]
    first, second, rest = x.split((r, r, x.shape[-1] - 2 * r), dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


def broadcastable(angles: Tensor, x: Tensor) -> Tensor:
    """Return a view of angles [B or 1, S, r] that broadcasts against x [B, S, ..., n]."""
    return angles.view(*angles.shape[:2], *(1,) * (x.dim() - 3), angles.shape[-1])


def angles(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Implement :func:`kernels.rotary.angles`."""
    angle = positions.double().unsqueeze(-1) * frequencies.to(positions.device)
    return angle.cos().float(), angle.sin().float()
