"""Short causal convolutions by native operators, with one pass over the tokens forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import native


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, tail: Tensor | None = None, positions: Tensor | None = None
) -> Tensor:
    """Implement :func:`kernels.causal_conv.causal_conv`, without the next tail, for float32."""
    if torch.is_grad_enabled():
        return _CausalConv.apply(x, weight, bias, tail, positions)
    return native.op("causal_conv")(x, weight, bias, tail, positions)


class _CausalConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, tail, positions):
        ctx.save_for_backward(x, weight, bias, tail, positions)
        return native.op("causal_conv")(x, weight, bias, tail, positions)

    @staticmethod
    def backward(ctx, grad):
        x, weight, bias, tail, positions = ctx.saved_tensors
        # One row of weight gradients per sequence: their sum does not depend on the number of threads.
        grad_x, grad_tail, rows = native.op("causal_conv_backward")(grad, x, weight, bias, tail, positions)
        sums = rows.sum(0)
        grad_bias = None if bias is None else sums[-1]
        return grad_x, sums[:-1].T, grad_bias, None if tail is None else grad_tail, None
