"""Root-mean-square normalisation."""

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """``x / rms(x) * weight`` over the last dim, in float32."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_normalize(x, self.eps, self.weight)


def rms_normalize(x: Tensor, eps: float, weight: Tensor | None = None) -> Tensor:
    """RMS normalisation of x [..., n], times a weight [n] if there is one, in float32."""
    return _Normalize.apply(x, weight, eps)


class _Normalize(torch.autograd.Function):
    # Written out, because what autograd records goes over the rows twice as often and keeps them in float32 where they
    # come in BF16.
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
            grad_weight = scale.flatten() @ product.flatten(0, -2)
            along, grad = (product @ weight).unsqueeze(-1), grad * weight
        along = along * scale.square() / x.shape[-1]
        return torch.addcmul(grad, x, along, value=-1).mul_(scale).to(x.dtype), grad_weight, None
