"""Rounding to a storage format inside the forward pass, gradients passed straight through.

FP4 blocks on a CPU are rounded in pieces that stay in the cache (``blocked.py``), all else as written in
``reference.py``: the same bits. ``backend=`` chooses by hand and :func:`backend_for` tells which one runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import formats
from kernels.quantize import blocked, reference
from kernels.quantize.reference import FORMATS, hadamard

BACKENDS = {"reference": reference, "blocked": blocked}


def backend_for(x: Tensor, fmt: str) -> str:
    whole = x.shape[-1] % formats.FP4_BLOCK == 0
    fits = fmt == "fp4" and whole and x.device.type == "cpu" and not torch.compiler.is_compiling()
    return "blocked" if fits else "reference"


def round_to_format(x: Tensor, fmt: str, dtype: torch.dtype = torch.float32, backend: str | None = None) -> Tensor:
    """See :func:`kernels.quantize.reference.round_to_format`."""
    return BACKENDS[backend or backend_for(x, fmt)].round_to_format(x, fmt, dtype)


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


__all__ = ["BACKENDS", "FORMATS", "backend_for", "fake_quantize", "hadamard", "round_to_format"]
