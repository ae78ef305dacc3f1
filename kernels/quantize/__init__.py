"""Fake quantization: rounding to a storage format within the forward pass.

Formats: ``fp32``; ``bf16``; ``fp8``, E4M3 with one E8M0 scale per 64 values; ``fp8_128``, E4M3 with one FP32 scale, a
power of two, per 128; ``fp4``, E2M1 with one E8M0 scale per 32. Rounding equals a round trip through
:mod:`kernels.cache_io`. All backends produce the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import formats, native
from kernels.backends import get_backend
from kernels.cache_io import EntryLayout
from kernels.cache_io.layout import SCALED_FORMATS
from kernels.cache_io.triton import DTYPES
from kernels.quantize import cpu, eager, reference, triton
from kernels.quantize.reference import FORMATS
from kernels.triton_support.platform import can_run

__all__ = ["BACKENDS", "FORMATS", "backend_for", "fake_quantize", "round_to_format", "round_to_layout"]

BACKENDS = {"reference": reference, "eager": eager, "cpu": cpu, "triton": triton}


def backend_for(x: Tensor, fmt: str) -> str:
    """Return the backend that rounds x to ``fmt``."""
    if can_run(x) and fmt in SCALED_FORMATS and x.dtype in DTYPES:
        return "triton"
    if x.is_cpu and native.level() is not None:
        return "cpu"
    return "eager" if x.is_cpu and fmt == "fp4" and x.shape[-1] % formats.FP4_BLOCK == 0 else "reference"


def round_to_format(x: Tensor, fmt: str, dtype: torch.dtype = torch.float32, backend: str | None = None) -> Tensor:
    """Round x to a storage format. No gradient.

    Args:
        x: [..., n], any float dtype. Blocks of values that share a scale run along the last dim.
        fmt: One of :data:`FORMATS`. The ``eager`` backend supports only ``fp4`` and multiples of 32 for n.
        dtype: Dtype of the result. BF16 holds all values of formats with scales exactly.

    Raises:
        ValueError: For an unknown format.
    """
    if fmt not in FORMATS:
        raise ValueError(f"format '{fmt}' is not one of {', '.join(FORMATS)}")
    return get_backend(BACKENDS, backend or backend_for(x, fmt)).round_to_format(x, fmt, dtype)


class _FakeQuantize(torch.autograd.Function):
    # The usual x + (rounded - x).detach() does not reproduce the bits of the rounded value.
    @staticmethod
    def forward(ctx, x: Tensor, fmt: str, dtype: torch.dtype, backend: str | None) -> Tensor:
        ctx.dtype = x.dtype
        return round_to_format(x, fmt, dtype, backend)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad.to(ctx.dtype), None, None, None


def fake_quantize(x: Tensor, fmt: str, dtype: torch.dtype | None = None, backend: str | None = None) -> Tensor:
    """Round x as :func:`round_to_format` does, with a straight-through gradient.

    ``dtype`` is the dtype of the result, by default that of x.
    """
    dtype = dtype or x.dtype
    return x.to(dtype) if fmt == "fp32" else _FakeQuantize.apply(x, fmt, dtype, backend)


def round_to_layout(x: Tensor, layout: EntryLayout, backend: str | None = None) -> Tensor:
    """Round float32 x [..., layout.size] to the formats of a cache entry, with a straight-through gradient."""
    if backend in (None, "cpu") and native.serves(x):
        return cpu.round_to_layout(x, layout)
    if not layout.rope or layout.body_format == layout.rope_format:
        return fake_quantize(x, layout.body_format, backend=backend)
    body, rope = x.split((layout.body, layout.rope), dim=-1)
    parts = ((body, layout.body_format), (rope, layout.rope_format))
    return torch.cat([fake_quantize(part, fmt, backend=backend) for part, fmt in parts], dim=-1)
