"""Rounding to a storage format inside the forward pass, gradients passed straight through.

FP4 blocks on a CPU are rounded in pieces that stay in the cache (``blocked.py``), all else as written in
``reference.py``: the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import formats
from kernels.quantize import blocked, reference
from kernels.quantize.reference import FORMATS, hadamard


def round_to_format(x: Tensor, fmt: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """See :func:`kernels.quantize.reference.round_to_format`; in ``dtype``."""
    whole = x.device.type == "cpu" and x.shape[-1] % formats.FP4_BLOCK == 0
    if fmt == "fp4" and whole and not torch.compiler.is_compiling():
        return blocked.round_to_fp4(x.float(), dtype)
    return reference.round_to_format(x, fmt).to(dtype)


class _FakeQuantize(torch.autograd.Function):
    # x + (rounded - x).detach() would not give the rounded value's bits back.
    @staticmethod
    def forward(ctx, x: Tensor, fmt: str, dtype: torch.dtype) -> Tensor:
        ctx.dtype = x.dtype
        return round_to_format(x, fmt, dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad.to(ctx.dtype), None, None


def fake_quantize(x: Tensor, fmt: str, dtype: torch.dtype | None = None) -> Tensor:
    """:func:`round_to_format` with a straight-through gradient; in ``dtype``, by default that of ``x``."""
    dtype = dtype or x.dtype
    return x.to(dtype) if fmt == "fp32" else _FakeQuantize.apply(x, fmt, dtype)


__all__ = ["FORMATS", "fake_quantize", "hadamard", "round_to_format"]
