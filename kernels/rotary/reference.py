"""Rotary positions on interleaved pairs, in eager PyTorch (arXiv 2104.09864)."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (2k, 2k + 1) of the last ``2 * r`` dims of x [..., n] by angles whose cosines and sines, float32
    [..., r], broadcast over x's other dims. The dims before pass through. In the wider dtype of x and float32."""
    dim = 2 * cos.shape[-1]
    even, odd = x[..., -dim::2], x[..., x.shape[-1] - dim + 1 :: 2]
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
    return rotated if dim == x.shape[-1] else torch.cat((x[..., :-dim], rotated), dim=-1)
