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
FP8_TILE = 128
"""FP8 weights share a scale over tiles of 128 x 128; activations and cache entries over :data:`FP8_BLOCK` of a row."""


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
    """``2 ** (exponent - 127)`` as float32, for biased exponents 0..254 (255 is NaN in E8M0 and not expected here)."""
    # 2 ** -127 is subnormal: its bits are not those of the exponent 0, which would be zero.
    return (exponent.to(torch.int32) << 23).clamp(min=1 << 22).view(torch.float32)


def pack_e2m1(x: Tensor) -> Tensor:
    """E2M1 values [..., n] (n even, already on the grid) to bytes [..., n / 2], the even element in the low nibble."""
    magnitude = x.abs()
    # Codes 0..4 are magnitude * 2; above that the grid widens: 3 -> 5, 4 -> 6, 6 -> 7.
    code = torch.where(magnitude <= 2, magnitude * 2, torch.where(magnitude < 6, magnitude + 2, 7.0)).to(torch.uint8)
    code = code | (torch.signbit(x).to(torch.uint8) << 3)
    return code[..., 0::2] | (code[..., 1::2] << 4)


def unpack_e2m1(packed: Tensor) -> Tensor:
    """Inverse of :func:`pack_e2m1`: bytes [..., n / 2] to float32 [..., n]."""
    return torch.stack(unpack_e2m1_halves(packed), dim=-1).flatten(-2)


def unpack_e2m1_halves(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The same, elements at even and at odd places apart: float32 [..., n / 2] each."""
    codes = packed.to(torch.int32)
    low = ((codes & 0x07) << 22) | ((codes & 0x08) << 28)
    high = ((codes & 0x70) << 18) | ((codes & 0x80) << 24)
    # Exponent and mantissa stand in a float32's places, 126 too low. That makes 0.5 a subnormal on the way: with
    # torch.set_flush_denormal(True) it would come back as 0.
    return low.view(torch.float32) * 2.0**126, high.view(torch.float32) * 2.0**126


def unpack_e4m3(codes: Tensor) -> Tensor:
    """E4M3 codes, uint8 [...] (no NaN), to float32 [...]. Several times as fast as PyTorch's conversion on a CPU. Wrong
    for subnormals with torch.set_flush_denormal(True)."""
    bits = codes.to(torch.int32)
    return (((bits & 0x7F) << 20) | ((bits & 0x80) << 24)).view(torch.float32) * 2.0**120


def block_amax(x: Tensor, block: int) -> Tensor:
    """The largest magnitude of each block of neighbours: [..., n] to [..., ceil(n / block)], the last maybe shorter."""
    whole = x.shape[-1] // block * block
    amax = x[..., :whole].unflatten(-1, (-1, block)).abs().amax(-1)
    return amax if whole == x.shape[-1] else torch.cat((amax, x[..., whole:].abs().amax(-1, keepdim=True)), dim=-1)


def per_element(scales: Tensor, block: int, size: int) -> Tensor:
    """[..., ceil(size / block)] to [..., size]: for each element its block's."""
    whole, rest = divmod(size, block)
    full = scales[..., :whole].unsqueeze(-1).expand(*scales.shape[:-1], whole, block).flatten(-2)
    return torch.cat((full, scales[..., whole:].expand(*scales.shape[:-1], rest)), dim=-1) if rest else full


def round_to_bf16(x: Tensor) -> Tensor:
    """Nearest BF16 value. Float32 in and out."""
    return x.to(torch.bfloat16).float()


def quantize_fp8_tiles(x: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """float32 [out, in] to float8_e4m3fn values of the same shape and uint8 scales [ceil(out / 128), ceil(in / 128)].

    A tile's scale is the smallest power of two that fits it (no floor but the format's). The same values can be written
    under several scales, so ``keep`` names the scales that a tensor was read with: a tile keeps its own as long as all
    its values are exact under it.
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
    """Inverse of :func:`quantize_fp8_tiles`: float32 [out, in]."""
    per_row = e8m0_to_float(scales).repeat_interleave(FP8_TILE, 0)[: values.shape[0]]
    return values.float() * per_row.repeat_interleave(FP8_TILE, 1)[:, : values.shape[1]]


def quantize_fp4_groups(x: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """float32 [..., n], n a multiple of 32, to packed uint8 [..., n / 2] and uint8 scales [..., n / 32].

    ``keep`` as in :func:`quantize_fp8_tiles`.
    """
    groups = x.unflatten(-1, (-1, FP4_BLOCK))
    scales = e8m0_from_amax(groups.abs().amax(-1), E2M1_MAX, FP4_AMAX_FLOOR)
    if keep is not None:
        kept = e8m0_to_float(keep).unsqueeze(-1)
        exact = (round_to_e2m1(groups / kept) * kept == groups).all(-1)
        scales = torch.where(exact, keep, scales)
    return pack_e2m1(round_to_e2m1(groups / e8m0_to_float(scales).unsqueeze(-1)).flatten(-2)), scales


def dequantize_fp4_groups(packed: Tensor, scales: Tensor) -> Tensor:
    """Inverse of :func:`quantize_fp4_groups`: float32 [..., n]."""
    return (unpack_e2m1(packed).unflatten(-1, (-1, FP4_BLOCK)) * e8m0_to_float(scales).unsqueeze(-1)).flatten(-2)


def fp4_groups_to_fp8_tiles(packed: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """FP4 weights [out, in / 2] with scales [out, in / 32] as FP8 tiles of exactly the same values (report 5.2.1).

    A tile's scale is its largest group scale / 2 ** 6, so that 6 becomes 384. Exact whatever the codes while a tile's
    largest and smallest group scale are at most 2 ** 11 apart without E4M3's subnormals, 2 ** 14 with them.
    Raises ValueError, naming the first tile, where a value has no E4M3 code.
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
