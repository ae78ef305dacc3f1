"""Number formats: FP4 E2M1, FP8 E4M3 and E8M0 scales, with round-to-nearest-even.

A quantized value is the product of a grid value and a power-of-two scale. A block of neighbors along the last dim
shares a scale, ``2 ** ceil(log2(max(amax, floor) / grid_max))``, as in the reference code of DeepSeek-V4.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

E2M1_MAX = 6.0
E4M3_MAX = 448.0
FP8_AMAX_FLOOR = 1e-4
FP4_AMAX_FLOOR = E2M1_MAX * 2.0**-126
FP8_BLOCK = 64
FP8_WIDE_BLOCK = 128
FP4_BLOCK = 32
FP8_TILE = 128
"""FP8 weights have one scale per tile of 128 x 128. Activations and cache entries have one per :data:`FP8_BLOCK`."""


def round_to_e2m1(x: Tensor) -> Tensor:
    """Round float32 to the nearest E2M1 value, with ties to the even code and saturation at 6. Returns float32."""
    magnitude = x.abs().clamp(max=E2M1_MAX)
    # Steps are 0.5 below 2, 1 below 4 and 2 above. Rounding a multiple of the step breaks ties to the even code.
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    return torch.copysign(torch.round(magnitude / step) * step, x)


def round_to_e4m3(x: Tensor) -> Tensor:
    """Round float32 to the nearest E4M3 value, with saturation at 448. Returns float32."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).to(torch.float32)


def e8m0_from_amax(amax: Tensor, grid_max: float, floor: float) -> Tensor:
    """Return the biased exponent, uint8, of the smallest power of two s with ``amax / s <= grid_max``.

    ``amax`` is float32, and replaced by ``floor`` where smaller.
    """
    ratio = (amax.clamp(min=floor) / grid_max).contiguous()
    bits = ratio.view(torch.int32)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(torch.int32)  # ceil(log2) from the bits of the float
    return exponent.clamp(1, 254).to(torch.uint8)


def e8m0_to_float(exponent: Tensor) -> Tensor:
    """Return ``2 ** (exponent - 127)`` in float32, for biased exponents from 0 to 254. 255, NaN, is not supported."""
    # 2 ** -127 is subnormal. Shifting exponent 0 would give zero instead.
    return (exponent.to(torch.int32) << 23).clamp(min=1 << 22).view(torch.float32)


def pack_e2m1(x: Tensor) -> Tensor:
    """Pack E2M1 values [..., n], n even, into uint8 [..., n / 2]. Even elements are in the low nibbles."""
    magnitude = x.abs()
    # Magnitudes up to 2 have the codes 2 * magnitude. Above, 3 -> 5, 4 -> 6, 6 -> 7.
    code = torch.where(magnitude <= 2, magnitude * 2, torch.where(magnitude < 6, magnitude + 2, 7.0)).to(torch.uint8)
    code = code | (torch.signbit(x).to(torch.uint8) << 3)
    return code[..., 0::2] | (code[..., 1::2] << 4)


def unpack_e2m1(packed: Tensor) -> Tensor:
    """Unpack uint8 [..., n / 2] into float32 [..., n], the inverse of :func:`pack_e2m1`."""
    codes = packed.to(torch.int32)
    low = ((codes & 0x07) << 22) | ((codes & 0x08) << 28)
    high = ((codes & 0x70) << 18) | ((codes & 0x80) << 24)
    # Exponent and mantissa have the positions of those of a float32, with an exponent too low by 126. Before the
    # product 0.5 is thus subnormal: torch.set_flush_denormal(True) would turn it into 0.
    pairs = torch.stack((low.view(torch.float32) * 2.0**126, high.view(torch.float32) * 2.0**126), dim=-1)
    return pairs.flatten(-2)


def unpack_e4m3(codes: Tensor) -> Tensor:
    """Convert E4M3 codes, uint8 without NaN, to float32.

    Several times as fast as the conversion of PyTorch on a CPU. Subnormals become 0 with
    ``torch.set_flush_denormal(True)``.
    """
    bits = codes.to(torch.int32)
    return (((bits & 0x7F) << 20) | ((bits & 0x80) << 24)).view(torch.float32) * 2.0**120


def block_amax(x: Tensor, block: int) -> Tensor:
    """Return the largest magnitude of every block of neighbors: [..., n] to [..., ceil(n / block)].

    The last block may be shorter.
    """
    whole = x.shape[-1] // block * block
    amax = x[..., :whole].unflatten(-1, (-1, block)).abs().amax(-1)
    return amax if whole == x.shape[-1] else torch.cat((amax, x[..., whole:].abs().amax(-1, keepdim=True)), dim=-1)


def per_element(scales: Tensor, block: int, size: int) -> Tensor:
    """Repeat the scale of every block for its elements: [..., ceil(size / block)] to [..., size]."""
    whole, rest = divmod(size, block)
    full = scales[..., :whole].unsqueeze(-1).expand(*scales.shape[:-1], whole, block).flatten(-2)
    return torch.cat((full, scales[..., whole:].expand(*scales.shape[:-1], rest)), dim=-1) if rest else full


def round_to_bf16(x: Tensor) -> Tensor:
    """Round float32 to the nearest BF16 value. Returns float32."""
    return x.to(torch.bfloat16).float()


def quantize_fp8_tiles(x: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantize float32 [out, in] to FP8 with one scale per tile.

    The scale of a tile is the smallest power of two that fits.

    Args:
        x: float32 [out, in].
        keep: uint8 scales that the tensor was dequantized with, or None. A tile keeps its scale as long as all its
            values are exact under it. Values alone do not determine the scales.

    Returns:
        float8_e4m3fn [out, in] and uint8 scales [ceil(out / 128), ceil(in / 128)].
    """
    R, C = (-(-n // FP8_TILE) for n in x.shape)
    tiles = F.pad(x, (0, C * FP8_TILE - x.shape[1], 0, R * FP8_TILE - x.shape[0])).view(R, FP8_TILE, C, FP8_TILE)
    scales = e8m0_from_amax(tiles.abs().amax((1, 3)), E4M3_MAX, E4M3_MAX * 2.0**-126)

    def over_tiles(scales: Tensor) -> Tensor:
        return e8m0_to_float(scales)[:, None, :, None]

    if keep is not None:
        kept = over_tiles(keep)
        exact = (round_to_e4m3(tiles / kept) * kept == tiles).all(3).all(1)
        scales = torch.where(exact, keep, scales)
    values = (tiles / over_tiles(scales)).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return values.view(R * FP8_TILE, C * FP8_TILE)[: x.shape[0], : x.shape[1]].contiguous(), scales


def dequantize_fp8_tiles(values: Tensor, scales: Tensor) -> Tensor:
    """Return the values of :func:`quantize_fp8_tiles`: float32 [out, in]."""
    per_row = e8m0_to_float(scales).repeat_interleave(FP8_TILE, 0)[: values.shape[0]]
    return values.float() * per_row.repeat_interleave(FP8_TILE, 1)[:, : values.shape[1]]


def quantize_fp4_groups(x: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantize float32 [..., n], n a multiple of 32, to FP4 with one scale per group of 32.

    ``keep`` is as in :func:`quantize_fp8_tiles`. Returns packed uint8 [..., n / 2] and uint8 scales [..., n / 32].
    """
    groups = x.unflatten(-1, (-1, FP4_BLOCK))
    scales = e8m0_from_amax(groups.abs().amax(-1), E2M1_MAX, FP4_AMAX_FLOOR)
    if keep is not None:
        kept = e8m0_to_float(keep).unsqueeze(-1)
        exact = (round_to_e2m1(groups / kept) * kept == groups).all(-1)
        scales = torch.where(exact, keep, scales)
    return pack_e2m1(round_to_e2m1(groups / e8m0_to_float(scales).unsqueeze(-1)).flatten(-2)), scales


def dequantize_fp4_groups(packed: Tensor, scales: Tensor) -> Tensor:
    """Return the values of :func:`quantize_fp4_groups`: float32 [..., n]."""
    return (unpack_e2m1(packed).unflatten(-1, (-1, FP4_BLOCK)) * e8m0_to_float(scales).unsqueeze(-1)).flatten(-2)


def fp4_groups_to_fp8_tiles(packed: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Convert FP4 weights to FP8 tiles of exactly the same values (report 5.2.1).

    The scale of a tile is its largest group scale / 2 ** 6, so that 6 becomes 384. The conversion is exact for all
    codes if the largest and the smallest group scale of a tile differ by at most 2 ** 11; with subnormals of E4M3,
    2 ** 14.

    Args:
        packed: uint8 [out, in / 2].
        scales: uint8 [out, in / 32].

    Returns:
        float8_e4m3fn [out, in] and uint8 scales [ceil(out / 128), ceil(in / 128)].

    Raises:
        ValueError: If a value has no E4M3 code. Names the first tile.
    """
    rows, columns = scales.shape
    per_tile = FP8_TILE // FP4_BLOCK
    R, C = -(-rows // FP8_TILE), -(-columns // per_tile)
    padded = F.pad(scales, (0, C * per_tile - columns, 0, R * FP8_TILE - rows))
    largest = padded.view(R, FP8_TILE, C, per_tile).amax((1, 3))
    tile_scales = (largest.to(torch.int32) - 6).clamp(min=0).to(torch.uint8)
    wide = tile_scales.repeat_interleave(FP8_TILE, 0)[:rows].repeat_interleave(per_tile, 1)[:, :columns]
    shift = (scales.to(torch.float64) - wide.to(torch.float64)).exp2().unsqueeze(-1)
    exact = (unpack_e2m1(packed).double().unflatten(-1, (-1, FP4_BLOCK)) * shift).flatten(-2)
    values = exact.float().to(torch.float8_e4m3fn)
    wrong = (values.double() != exact).nonzero()
    if len(wrong):
        row, column = (int(n) // FP8_TILE for n in wrong[0])
        inside = scales[row * FP8_TILE :, column * per_tile :][:FP8_TILE, :per_tile]
        apart = int(inside.max()) - int(inside.min())
        raise ValueError(f"tile [{row}, {column}]: group scales 2 ** {apart} apart do not fit one FP8 scale exactly")
    return values, tile_scales
