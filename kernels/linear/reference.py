"""Matrix products in PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.autocast import product_dtype


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Implement :func:`kernels.linear.linear`."""
    if weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        return F.linear(x.to(weight.dtype), weight).to(x.dtype)
    return F.linear(x, weight)


def linear_concat(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Implement :func:`kernels.linear.linear_concat`."""
    return torch.cat([linear(x, weight) for weight in weights], dim=-1)


def grouped_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Implement :func:`kernels.linear.grouped_linear`."""
    if x.device.type == "cpu":
        # One product per group: CPU libraries copy the transposed operands of a batched product.
        groups = x.to(product_dtype(x)).unflatten(-1, (len(weight), -1)).unbind(-2)
        return torch.cat([linear(*group) for group in zip(groups, weight.unbind())], dim=-1)
    if weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        return grouped_linear(x.to(weight.dtype), weight).to(x.dtype)
    return torch.einsum("...gi,goi->...go", x.unflatten(-1, (len(weight), -1)), weight).flatten(-2)
