"""RMS normalisation in eager PyTorch (arXiv 1910.07467)."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_normalize(x: Tensor, eps: float, weight: Tensor | None = None) -> Tensor:
    """``x / sqrt(mean(x^2) + eps)`` over the last dim of x [..., n], times a weight [n] if there is one; float32."""
    wide = x.float()
    out = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return out if weight is None else out * weight
