"""Rounding to a storage format in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import formats
from kernels.cache_io.layout import SCALED_FORMATS

FORMATS = ("fp32", "bf16", *SCALED_FORMATS)
_TO_GRID = {"e4m3": formats.round_to_e4m3, "e2m1": formats.round_to_e2m1}


@torch.no_grad()
def round_to_format(x: Tensor, fmt: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Implement :func:`kernels.quantize.round_to_format`."""
    if fmt == "fp32":
        return x.to(dtype)
    if fmt == "bf16":
        return formats.round_to_bf16(x.float()).to(dtype)
    scales = SCALED_FORMATS[fmt]
    x, size = x.float(), x.shape[-1]
    block = min(scales.block, size)
    exponents = formats.e8m0_from_amax(formats.block_amax(x, block), scales.max, scales.floor)
    scale = formats.per_element(formats.e8m0_to_float(exponents), block, size)
    return (_TO_GRID[scales.grid](x / scale) * scale).to(dtype)
