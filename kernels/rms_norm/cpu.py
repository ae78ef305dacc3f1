"""RMS normalization by native operators, with one pass over the rows forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import native


def rms_norm(x: Tensor, eps: float, weight: Tensor | None = None) -> Tensor:
    """Implement :func:`kernels.rms_norm.rms_norm` for float32 or BF16 x."""
    if torch.is_grad_enabled():
        return _RMSNorm.apply(x, weight, eps)
    return native.op("rms_norm")(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return native.op("rms_norm")(x, weight, eps)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        grad_x, grad_weight = native.op("rms_norm_backward")(grad, x, weight, ctx.eps)
        return grad_x, None if weight is None else grad_weight, None
