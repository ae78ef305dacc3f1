"""SwiGLU by native operators, in one pass forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import native


def swiglu(gate: Tensor, up: Tensor, limit: float, gain: Tensor | None = None) -> Tensor:
    """Implement :func:`kernels.swiglu.swiglu` for gate and up in float32 or BF16, both alike, and float32 gain."""
    if torch.is_grad_enabled():
        return _SwiGLU.apply(gate, up, gain, limit)
    return native.op("swiglu")(gate, up, limit, gain)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, gain: Tensor | None, limit: float) -> Tensor:
        ctx.save_for_backward(gate, up, gain)
        ctx.limit = limit
        return native.op("swiglu")(gate, up, limit, gain)

    @staticmethod
    def backward(ctx, grad: Tensor):
        gate, up, gain = ctx.saved_tensors
        grad_gate, grad_up, grad_gain = native.op("swiglu_backward")(grad, gate, up, ctx.limit, gain)
        return grad_gate, grad_up, None if gain is None else grad_gain.view_as(gain), None
