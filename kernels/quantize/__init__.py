"""Rounding to a storage format inside the forward pass, gradients passed straight through.

On a CPU values are rounded by a native operator (``cpu.cpp``), or without that FP4 blocks in pieces that stay in the
cache (``blocked.py``); all else as written in ``reference.py``. All give the same bits. ``backend=`` forces one and
:func:`backend_for` tells which one runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import formats, native
from kernels.cache_io import EntryLayout
from kernels.quantize import blocked, cpu, reference
from kernels.quantize.reference import FORMATS

BACKENDS = {"reference": reference, "blocked": blocked, "cpu": cpu}


def backend_for(x: Tensor, fmt: str) -> str:
    whole = x.shape[-1] % formats.FP4_BLOCK == 0
    if x.is_cpu and native.level() is not None:
        return "cpu"
    fits = fmt == "fp4" and whole and x.device.type == "cpu"
    return "blocked" if fits else "reference"


def round_to_format(x: Tensor, fmt: str, dtype: torch.dtype = torch.float32, backend: str | None = None) -> Tensor:
    """See :func:`kernels.quantize.reference.round_to_format`."""
    if fmt not in FORMATS:
        raise ValueError(f"format '{fmt}' is not one of {', '.join(FORMATS)}")
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


def round_to_layout(x: Tensor, layout: EntryLayout) -> Tensor:
    """The values of float32 x [..., size] after a round trip through a cache entry of ``layout``, with a
    straight-through gradient."""
    if native.serves(x):
        return cpu.round_to_layout(x, layout)
    if not layout.rope or layout.body_format == layout.rope_format:
        return fake_quantize(x, layout.body_format)
    body, rope = x.split((layout.body, layout.rope), dim=-1)
    return torch.cat((fake_quantize(body, layout.body_format), fake_quantize(rope, layout.rope_format)), dim=-1)


def hadamard(x: Tensor) -> Tensor:
    """See :func:`kernels.quantize.reference.hadamard`. Native on a CPU without gradients."""
    return cpu.hadamard(x) if native.serves(x) else reference.hadamard(x)


__all__ = ["BACKENDS", "FORMATS", "backend_for", "fake_quantize", "hadamard", "round_to_format", "round_to_layout"]
