"""Rotary position embedding by native operators."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import native
from kernels.autocast import cast


def rotate(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """Implement :func:`kernels.rotary.rotate` for float32 or BF16 x."""
    return _Rotate.apply(x, cos, sin, inverse) if torch.is_grad_enabled() else native.op("rotate")(x, cos, sin, inverse)


def angles(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Implement :func:`kernels.rotary.angles`."""
    return native.op("angles")(cast(positions, torch.int64), frequencies)


class _Rotate(torch.autograd.Function):
    """:func:`rotate`. The gradient is the rotation by the opposite angle."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.dtype, ctx.inverse = x.dtype, inverse
        return native.op("rotate")(x, cos, sin, inverse)

    @staticmethod
    def backward(ctx, grad: Tensor):
        cos, sin = ctx.saved_tensors
        return native.op("rotate")(grad, cos, sin, not ctx.inverse).to(ctx.dtype), None, None, None
