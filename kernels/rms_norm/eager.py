"""RMS normalization with an explicit backward pass.

It reads the rows half as often as the graph that autograd would record, and saves BF16 inputs in BF16.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, eps: float, weight: Tensor | None = None) -> Tensor:
    """Implement :func:`kernels.rms_norm.rms_norm`."""
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, scale, weight)
        out = wide * scale
        return out if weight is None else out * weight

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, scale, weight = ctx.saved_tensors
        grad_weight, product = None, grad * x
        if weight is None:
            along = product.sum(-1, keepdim=True)
        else:
            grad_weight = scale.flatten() @ product.reshape(-1, product.shape[-1])
            along, grad = (product @ weight).unsqueeze(-1), grad * weight
        along = along * scale.square() / x.shape[-1]
        return torch.addcmul(grad, x, along, value=-1).mul_(scale).to(x.dtype), grad_weight, None
