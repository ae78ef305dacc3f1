"""Sums in an order that depends on the number of terms only, so that a result has the same bits in any batch."""

from __future__ import annotations

import torch
from torch import Tensor


def sum_pairwise(x: Tensor) -> Tensor:
    """Sum over the last dim by adding its halves elementwise."""
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        summed = x[..., :half] + x[..., half : 2 * half]
        x = torch.cat((summed, x[..., 2 * half :]), dim=-1) if x.shape[-1] % 2 else summed
    return x.squeeze(-1)
