import itertools

import pytest
import torch
from backend_testing import E2M1_VALUES

from kernels import formats
from kernels.quantize import round_to_format


def test_every_e2m1_code_and_midpoint():
    grid = list(E2M1_VALUES)
    assert formats.round_to_e2m1(torch.tensor(grid)).tolist() == grid
    # Halfway between two codes, the even one wins.
    for code, (low, high) in enumerate(itertools.pairwise(grid)):
        even = low if code % 2 == 0 else high
        middle = (low + high) / 2
        assert formats.round_to_e2m1(torch.tensor([middle, -middle])).tolist() == [even, -even]
        assert formats.round_to_e2m1(torch.tensor([middle - 1e-4])).item() == low
        assert formats.round_to_e2m1(torch.tensor([middle + 1e-4])).item() == high
    assert formats.round_to_e2m1(torch.tensor([6.1, 1e9, -1e9])).tolist() == [6, 6, -6]


def test_e2m1_packing_keeps_all_sixteen_codes():
    values = torch.tensor([*E2M1_VALUES, *(-v for v in E2M1_VALUES)])
    packed = formats.pack_e2m1(values)
    assert packed.dtype == torch.uint8 and packed.numel() == 8
    assert torch.equal(formats.unpack_e2m1(packed), values)
    assert torch.equal(torch.signbit(formats.unpack_e2m1(packed)), torch.signbit(values))
    assert packed[0].item() == 0x10  # codes 0 and 1: the even element in the low nibble


def test_every_byte_of_two_e2m1_codes():
    grid = torch.tensor([*E2M1_VALUES, *(-v for v in E2M1_VALUES)])
    codes = torch.arange(256)
    expected = torch.stack((grid[codes % 16], grid[codes // 16]), dim=-1).flatten()
    found = formats.unpack_e2m1(codes.to(torch.uint8))
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))  # compares the sign of zero


def test_every_e4m3_code_but_nan():
    codes = torch.arange(256, dtype=torch.uint8)
    expected = codes.view(torch.float8_e4m3fn).float()
    finite = ~expected.isnan()
    assert finite.sum() == 254
    assert torch.equal(formats.unpack_e4m3(codes)[finite].view(torch.int32), expected[finite].view(torch.int32))


@pytest.mark.parametrize("grid_max", [6.0, 448.0])
def test_scale_is_the_smallest_power_of_two_that_fits(grid_max):
    amax = torch.cat((torch.logspace(-6, 6, 200), grid_max * 2.0 ** torch.arange(-5, 6)))
    scale = formats.e8m0_to_float(formats.e8m0_from_amax(amax, grid_max, 1e-30))
    assert torch.equal(torch.log2(scale), torch.log2(scale).round())
    assert (amax / scale <= grid_max).all()
    assert (amax / (scale / 2) > grid_max).all()


# --- weights: FP8 tiles of 128 x 128, FP4 groups of 32


def test_every_scale_code_but_nan():
    codes = torch.arange(255, dtype=torch.uint8)
    expected = torch.tensor([2.0 ** (n - 127) for n in range(255)])
    assert torch.equal(formats.e8m0_to_float(codes), expected)
    assert torch.equal(codes.view(torch.float8_e8m0fnu).float(), expected)


@pytest.mark.parametrize("shape", [(128, 128), (1, 1), (129, 127), (300, 40), (40, 300)])
def test_fp8_tiles(shape):
    x = torch.randn(shape) * torch.logspace(-6, 3, shape[0]).unsqueeze(1)
    values, scales = formats.quantize_fp8_tiles(x)
    assert values.dtype == torch.float8_e4m3fn and values.shape == shape
    assert scales.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    back = formats.dequantize_fp8_tiles(values, scales)
    for r, c in itertools.product(*map(range, scales.shape)):
        tile = (slice(128 * r, 128 * r + 128), slice(128 * c, 128 * c + 128))
        scale = 2.0 ** (int(scales[r, c]) - 127)
        assert x[tile].abs().max() / scale <= 448 < x[tile].abs().max() / (scale / 2)
        assert torch.equal(back[tile], formats.round_to_e4m3(x[tile] / scale) * scale)
    again = formats.quantize_fp8_tiles(back, scales)
    assert torch.equal(again[0].view(torch.uint8), values.view(torch.uint8)) and torch.equal(again[1], scales)


def test_fp4_groups_equal_those_of_the_cache_format():
    x = torch.randn(5, 7, 96)
    packed, scales = formats.quantize_fp4_groups(x)
    assert packed.shape == (5, 7, 48) and scales.shape == (5, 7, 3) and packed.dtype == scales.dtype == torch.uint8
    assert torch.equal(formats.dequantize_fp4_groups(packed, scales), round_to_format(x, "fp4"))


@pytest.mark.parametrize("scale", [1, 120, 127, 200])
def test_every_fp4_code_survives_under_the_scale_that_it_was_read_with(scale):
    codes = torch.arange(32, dtype=torch.uint8) % 16
    packed = (codes[0::2] | (codes[1::2] << 4)).view(1, 16)
    kept = torch.tensor([[scale]], dtype=torch.uint8)
    values = formats.dequantize_fp4_groups(packed, kept)
    found = formats.quantize_fp4_groups(values, kept)
    assert torch.equal(found[0], packed) and torch.equal(found[1], kept)  # negative zero, code 8, included
    low = torch.where((packed & 0x7) <= 2, packed & 0x7, 0) | torch.where((packed & 0x70) <= 0x20, packed & 0x70, 0)
    values = formats.dequantize_fp4_groups(low, kept)  # at most 1.0: a smaller scale fits
    assert formats.quantize_fp4_groups(values)[1].item() == max(scale - 2, 1)
    found = formats.quantize_fp4_groups(values, kept)
    assert torch.equal(found[0], low) and torch.equal(found[1], kept)
    values[0, 0] = 7 * 2.0 ** (scale - 127)  # has no code under the old scale
    assert formats.quantize_fp4_groups(values, kept)[1].item() == scale + 1


@pytest.mark.parametrize("apart", [0, 1, 6, 11, 14])
def test_fp4_converts_to_fp8_bit_for_bit(apart):
    torch.manual_seed(apart)
    packed = torch.randint(0, 256, (200, 80), dtype=torch.uint8)  # includes partial tiles
    scales = torch.randint(100, 101 + apart, (200, 5), dtype=torch.uint8)
    scales[0, 0], scales[0, 1] = 100, 100 + apart
    values, tiles = formats.fp4_groups_to_fp8_tiles(packed, scales)
    assert tiles.shape == (2, 2) and tiles[0, 0] == 100 + apart - 6
    expected = formats.dequantize_fp4_groups(packed, scales)
    found = formats.dequantize_fp8_tiles(values, tiles)
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))  # compares the sign of zero


def test_fp4_tiles_without_an_fp8_scale_are_refused():
    packed = torch.full((128, 64), 0x11, dtype=torch.uint8)  # 0.5 everywhere
    scales = torch.full((128, 4), 100, dtype=torch.uint8)
    scales[3, 2] = 115
    with pytest.raises(ValueError, match=r"tile \[0, 0\]: group scales 2 \*\* 15 apart"):
        formats.fp4_groups_to_fp8_tiles(packed, scales)
    packed[:] = 0x22  # 1.0, which needs no half step
    values, tiles = formats.fp4_groups_to_fp8_tiles(packed, scales)
    assert torch.equal(formats.dequantize_fp8_tiles(values, tiles), formats.dequantize_fp4_groups(packed, scales))


@pytest.mark.parametrize("code", [0, 3, 254])
def test_fp4_to_fp8_at_the_ends_of_the_scale_range(code):
    packed = torch.full((4, 16), 0x21, dtype=torch.uint8)
    scales = torch.full((4, 1), code, dtype=torch.uint8)
    values, tiles = formats.fp4_groups_to_fp8_tiles(packed, scales)
    assert torch.equal(formats.dequantize_fp8_tiles(values, tiles), formats.dequantize_fp4_groups(packed, scales))
