"""Rounding to a storage format in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import formats

FORMATS = ("fp32", "bf16", "fp8", "fp4")


@torch.no_grad()
def round_to_format(x: Tensor, fmt: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Implement :func:`kernels.quantize.round_to_format`."""
    if fmt == "fp32":
        return x.to(dtype)
    if fmt == "bf16":
        return formats.round_to_bf16(x.float()).to(dtype)
    if fmt == "fp8":
        block, grid_max, floor, to_grid = (
            formats.FP8_BLOCK,
            formats.E4M3_MAX,
            formats.FP8_AMAX_FLOOR,
            formats.round_to_e4m3,
        )
    elif fmt == "fp4":
        block, grid_max, floor, to_grid = (
            formats.FP4_BLOCK,
            formats.E2M1_MAX,
            formats.FP4_AMAX_FLOOR,
            formats.round_to_e2m1,
        )
    else:
        raise ValueError(f"format '{fmt}' is not one of {', '.join(FORMATS)}")
    x, size = x.float(), x.shape[-1]
    block = min(block, size)
    exponents = formats.e8m0_from_amax(formats.block_amax(x, block), grid_max, floor)
    scale = formats.per_element(formats.e8m0_to_float(exponents), block, size)
    return (to_grid(x / scale) * scale).to(dtype)
