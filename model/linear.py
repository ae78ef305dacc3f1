"""Matrix products with a network's weights, which may be stored in BF16 while what flows is float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.autocast import product_dtype


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T`` for x [..., in] and weight [out, in] (or stacks [g, in] and [g, out, in]), in x's dtype.

    BF16 weights and float32 inputs are multiplied in BF16 units, sums kept in float32 and rounded to BF16 at the end;
    compiled for a single token, all in float32.
    """
    if torch.compiler.is_compiling() and x.numel() == weight.numel() // weight.shape[-2]:
        # One token: all time goes into reading the weights, which a fused sum does twice as fast as a CPU's library.
        return (weight * x.unsqueeze(-2)).sum(-1)
    if weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        return linear(x.to(weight.dtype), weight).to(x.dtype)
    if weight.dim() == 2:
        return F.linear(x, weight)
    if x.device.type == "cpu":
        # One product a group: of a batch of them a CPU's library copies what it gets transposed, forward and backward.
        groups = zip(x.to(product_dtype(x)).unbind(-2), weight.unbind())
        return torch.stack([F.linear(*group) for group in groups], dim=-2)
    return torch.einsum("...gi,goi->...go", x, weight)


class Linear(nn.Linear):
    """A linear layer without bias: :func:`linear`."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)
