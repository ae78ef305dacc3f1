"""Rounding to a storage format and the Hadamard rotation, in eager PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels import formats

FORMATS = ("fp32", "bf16", "fp8", "fp4")


@torch.no_grad()
def round_to_format(x: Tensor, fmt: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values that a tensor [..., n] has after a round trip through storage format ``fmt``, in ``dtype`` (BF16 or
    wider holds those of fp8 and fp4 exactly). No gradient.

    fp8: E4M3, one E8M0 scale per 64 along the last dim. fp4: E2M1, one per 32. Equal to what
    ``kernels.cache_io`` packs and unpacks, bit for bit.
    """
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


def hadamard(x: Tensor) -> Tensor:
    """Orthonormal Walsh-Hadamard rotation of the last dim [..., n], n a power of two: its own inverse.

    It spreads outliers over the block before FP4 rounding; inner products of two rotated vectors are unchanged.
    """
    n = x.shape[-1]
    return x @ _hadamard_matrix(n, x.device, x.dtype)


_MATRICES: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}


def _hadamard_matrix(n: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    key = (n, device, dtype)
    if key not in _MATRICES:
        if n < 1 or n & (n - 1):
            raise ValueError(f"hadamard: the last dim must be a power of two, found {n}")
        with torch.inference_mode(False):  # kept for later calls, which may want gradients through it
            matrix = torch.ones(1, 1)
            while matrix.shape[0] < n:
                matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
            _MATRICES[key] = (matrix / math.sqrt(n)).to(device, dtype)
    return _MATRICES[key]
