"""Number formats: FP4 E2M1, FP8 E4M3 and E8M0 scales, with round-to-nearest-even.

A quantised tensor is a grid value times a power-of-two scale that a block of neighbours shares along the last dim.
Scale rules are DeepSeek-V4's reference code's: ``2 ** ceil(log2(amax / grid_max))``, with ``amax`` floored.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_MAX = 6.0
E4M3_MAX = 448.0
FP8_AMAX_FLOOR = 1e-4
FP4_AMAX_FLOOR = E2M1_MAX * 2.0**-126
FP8_BLOCK = 64
FP4_BLOCK = 32
_E8M0_BIAS = 127


def round_to_e2m1(x: Tensor) -> Tensor:
    """Nearest E2M1 value, ties to the even code, saturating at 6. Float32 in and out."""
    magnitude = x.abs().clamp(max=E2M1_MAX)
    # The grid's step is 0.5 below 2, 1 below 4 and 2 above: rounding a multiple of the step ties to the even code.
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    return torch.copysign(torch.round(magnitude / step) * step, x)


def round_to_e4m3(x: Tensor) -> Tensor:
    """Nearest E4M3 value, saturating at 448. Float32 in and out."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).to(torch.float32)


def e8m0_from_amax(amax: Tensor, grid_max: float, floor: float) -> Tensor:
    """Biased exponent (uint8) of the smallest power of two s with ``amax / s <= grid_max``. ``amax`` is float32."""
    ratio = (amax.clamp(min=floor) / grid_max).contiguous()
    bits = ratio.view(torch.int32)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(torch.int32)  # ceil(log2), read off the float's bits
    return exponent.clamp(1, 254).to(torch.uint8)


def e8m0_to_float(exponent: Tensor) -> Tensor:
    """``2 ** (exponent - 127)`` as float32, for biased exponents 1..254."""
    return (exponent.to(torch.int32) << 23).view(torch.float32)


def pack_e2m1(x: Tensor) -> Tensor:
    """E2M1 values [..., n] (n even, already on the grid) to bytes [..., n / 2], the even element in the low nibble."""
    magnitude = x.abs()
    # Codes 0..4 are magnitude * 2; above that the grid widens: 3 -> 5, 4 -> 6, 6 -> 7.
    code = torch.where(magnitude <= 2, magnitude * 2, torch.where(magnitude < 6, magnitude + 2, 7.0)).to(torch.uint8)
    code = code | (torch.signbit(x).to(torch.uint8) << 3)
    return code[..., 0::2] | (code[..., 1::2] << 4)


def unpack_e2m1(packed: Tensor) -> Tensor:
    """Inverse of :func:`pack_e2m1`: bytes [..., n / 2] to float32 [..., n]."""
    table = torch.tensor(E2M1_VALUES + tuple(-v for v in E2M1_VALUES), device=packed.device)
    codes = torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)
    return table[codes.to(torch.int64)]


def to_blocks(x: Tensor, block: int) -> Tensor:
    """[..., n] to [..., ceil(n / block), block], zero-padded."""
    remainder = -x.shape[-1] % block
    if remainder:
        x = F.pad(x, (0, remainder))
    return x.unflatten(-1, (-1, block))


def from_blocks(blocks: Tensor, size: int) -> Tensor:
    """Inverse of :func:`to_blocks`."""
    return blocks.flatten(-2)[..., :size]
