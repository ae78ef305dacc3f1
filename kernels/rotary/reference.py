"""Rotary positions on interleaved pairs, in eager PyTorch (arXiv 2104.09864)."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """Rotate the pairs (2k, 2k + 1) of the last ``2 * r`` dims of x [B, S, ..., n]; ``inverse`` rotates back.

    Cosines and sines of the angles are float32 [B or 1, S, r]. The dims before pass through. In the wider dtype of x
    and float32.
    """
    cos, sin = aligned(cos, x), aligned(-sin if inverse else sin, x)
    dim = 2 * cos.shape[-1]
    even, odd = x[..., -dim::2], x[..., x.shape[-1] - dim + 1 :: 2]
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
    return rotated if dim == x.shape[-1] else torch.cat((x[..., :-dim], rotated), dim=-1)


def aligned(angles: Tensor, x: Tensor) -> Tensor:
    """Angles [B or 1, S, r] with dims of size 1 where x [B, S, ..., n] has more."""
    return angles.view(*angles.shape[:2], *(1,) * (x.dim() - 3), angles.shape[-1])


def angles(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines float32 [B, S, r] of positions int64 [B, S] times frequencies float64 [r], in float64 until
    the end: exact at a million tokens."""
    angle = positions.double().unsqueeze(-1) * frequencies.to(positions.device)
    return angle.cos().float(), angle.sin().float()
