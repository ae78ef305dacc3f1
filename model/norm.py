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
        return rms_normalize(x, self.eps) * self.weight


def rms_normalize(x: Tensor, eps: float) -> Tensor:
    """RMS normalisation without a weight, in float32."""
    return _Normalize.apply(x.float(), eps)


class _Normalize(torch.autograd.Function):
    # Written out, because what autograd records goes over the rows twice as often.
    @staticmethod
    def forward(ctx, x: Tensor, eps: float) -> Tensor:
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        out = x * scale
        ctx.save_for_backward(out, scale)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        out, scale = ctx.saved_tensors
        along = (grad * out).mean(-1, keepdim=True)
        return torch.addcmul(grad, out, along, value=-1).mul_(scale), None
