"""Products with weights, in eager PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.autocast import product_dtype


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T`` for x [..., in] and weight [out, in], in x's dtype (autocast's under autocast).

    BF16 weights and float32 inputs are multiplied in BF16, with sums in float32 that are rounded to BF16 at the end
    (``cpu`` rounds neither inputs nor sums).
    """
    if weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        return F.linear(x.to(weight.dtype), weight).to(x.dtype)
    return F.linear(x, weight)


def linear_concat(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """:func:`linear` with several weights, results side by side: [..., sum of outs]."""
    return torch.cat([linear(x, weight) for weight in weights], dim=-1)


def grouped_linear(x: Tensor, weight: Tensor) -> Tensor:
    """:func:`linear` for each group of inputs: x [..., g * in] and weight [g, out, in] -> [..., g * out]."""
    if x.device.type == "cpu":
        # One product for each group: for a batch of them a CPU's library copies transposed operands.
        groups = x.to(product_dtype(x)).unflatten(-1, (len(weight), -1)).unbind(-2)
        return torch.cat([linear(*group) for group in zip(groups, weight.unbind())], dim=-1)
    if weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        return grouped_linear(x.to(weight.dtype), weight).to(x.dtype)
    return torch.einsum("...gi,goi->...go", x.unflatten(-1, (len(weight), -1)), weight).flatten(-2)
