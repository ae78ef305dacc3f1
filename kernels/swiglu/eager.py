"""SwiGLU with an explicit backward pass.

Autograd would save six float32 tensors. Gate and up, in the dtype of the matrix products, are sufficient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.swiglu import reference


def swiglu(gate: Tensor, up: Tensor, limit: float, gain: Tensor | None = None) -> Tensor:
    """Implement :func:`kernels.swiglu.swiglu`."""
    return _SwiGLU.apply(gate, up, gain, limit)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, gain: Tensor | None, limit: float) -> Tensor:
        ctx.save_for_backward(gate, up, gain)
        ctx.limit = limit
        return reference.swiglu(gate, up, limit, gain)

    @staticmethod
    def backward(ctx, grad: Tensor):
        gate, up, gain = ctx.saved_tensors
        grad, g, u = grad.float(), gate.float().clamp(max=ctx.limit), up.float().clamp(-ctx.limit, ctx.limit)
        sigmoid = g.sigmoid()
        silu = g.mul_(sigmoid)
        grad_gain = None
        if gain is not None:
            grad_gain = (grad * silu * u).sum(-1, keepdim=True)
            grad = grad * gain
        grad_up = (grad * silu).masked_fill_(up.abs() > ctx.limit, 0)
        # silu' = sigmoid + silu * (1 - sigmoid)
        slope = torch.addcmul(sigmoid, silu, 1 - sigmoid)
        grad_gate = u.mul_(slope).mul_(grad).masked_fill_(gate > ctx.limit, 0)
        return grad_gate.to(gate.dtype), grad_up.to(up.dtype), grad_gain, None
