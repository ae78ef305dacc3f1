"""Rounding to FP4 on a CPU, in pieces that stay in the cache."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import formats

_BLOCKS = 1 << 11
"""FP4 blocks rounded together: 256 KiB of values and as much scratch memory."""
_ONE, _EXPONENT = 0x3F800000, 0x7F800000


def round_to_format(x: Tensor, fmt: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Implement :func:`kernels.quantize.round_to_format` for ``fp4``. Raises ValueError for other inputs."""
    if fmt != "fp4" or x.shape[-1] % formats.FP4_BLOCK:
        raise ValueError(
            f"quantize: the eager backend requires fp4 and a multiple of 32 dims, found {fmt} and {x.shape[-1]}"
        )
    x = x.detach().float()
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    blocks, rounded = x.reshape(-1, formats.FP4_BLOCK), out.view(-1, formats.FP4_BLOCK)
    values, shifts = x.new_empty(2, min(_BLOCKS, len(blocks)), formats.FP4_BLOCK)
    for given, result in zip(blocks.split(_BLOCKS), rounded.split(_BLOCKS)):
        value, shift = values[: len(given)], shifts[: len(given)]
        amax = torch.abs(given, out=value).amax(-1, keepdim=True)
        scale = formats.e8m0_to_float(formats.e8m0_from_amax(amax, formats.E2M1_MAX, formats.FP4_AMAX_FLOOR))
        torch.div(given, scale, out=value).clamp_(-formats.E2M1_MAX, formats.E2M1_MAX)
        # E2M1 has one mantissa bit, and steps of 0.5 below 1. Add and subtract a number whose last bit has the weight
        # of the last bit of the result: the addition rounds to it, ties to even.
        bits = shift.view(torch.int32)
        torch.bitwise_and(value.view(torch.int32), _EXPONENT, out=bits).clamp_(min=_ONE)
        shift.mul_(1.5 * 2.0**22)
        value.add_(shift).sub_(shift).mul_(scale)
        result.copy_(value.copysign_(given))
    return out
