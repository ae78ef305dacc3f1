"""Newton-Schulz iteration in PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

V4_COEFFICIENTS: tuple[tuple[float, float, float], ...] = (
    *((3.4445, -4.7750, 2.0315),) * 8,  # fast growth of small singular values, without convergence
    *((2.0, -1.5, 0.5),) * 2,  # convergence to one
)


def newton_schulz(
    matrices: Tensor,
    coefficients: Sequence[tuple[float, float, float]] = V4_COEFFICIENTS,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Implement :func:`kernels.newton_schulz.newton_schulz`."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.transpose(-1, -2) if tall else matrices
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-20)).to(dtype)
    for a, b, c in coefficients:
        gram = x @ x.transpose(-1, -2)
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    x = x.to(matrices.dtype)
    return x.transpose(-1, -2) if tall else x
