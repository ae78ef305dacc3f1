import itertools

import pytest
import torch

from kernels import formats
from kernels.cache_io import EntryLayout, pack, unpack
from kernels.quantize import fake_quantize, hadamard, reference, round_to_format


def test_every_e2m1_code_and_midpoint():
    grid = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    assert formats.round_to_e2m1(torch.tensor(grid)).tolist() == grid
    # Halfway between two codes the even code wins.
    for code, (low, high) in enumerate(itertools.pairwise(grid)):
        even = low if code % 2 == 0 else high
        middle = (low + high) / 2
        assert formats.round_to_e2m1(torch.tensor([middle, -middle])).tolist() == [even, -even]
        assert formats.round_to_e2m1(torch.tensor([middle - 1e-4])).item() == low
        assert formats.round_to_e2m1(torch.tensor([middle + 1e-4])).item() == high
    assert formats.round_to_e2m1(torch.tensor([6.1, 1e9, -1e9])).tolist() == [6, 6, -6]


def test_e2m1_packing_keeps_all_sixteen_codes():
    values = torch.tensor([*formats.E2M1_VALUES, *(-v for v in formats.E2M1_VALUES)])
    packed = formats.pack_e2m1(values)
    assert packed.dtype == torch.uint8 and packed.numel() == 8
    assert torch.equal(formats.unpack_e2m1(packed), values)
    assert torch.equal(torch.signbit(formats.unpack_e2m1(packed)), torch.signbit(values))
    assert packed[0].item() == 0x10  # codes 0 and 1: the even element in the low nibble


def test_every_byte_of_two_e2m1_codes():
    grid = torch.tensor([*formats.E2M1_VALUES, *(-v for v in formats.E2M1_VALUES)])
    codes = torch.arange(256)
    expected = torch.stack((grid[codes % 16], grid[codes // 16]), dim=-1).flatten()
    found = formats.unpack_e2m1(codes.to(torch.uint8))
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))  # the sign of zero, too


def test_every_e4m3_code_but_nan():
    codes = torch.arange(256, dtype=torch.uint8)
    expected = codes.view(torch.float8_e4m3fn).float()
    numbers = ~expected.isnan()
    assert numbers.sum() == 254
    assert torch.equal(formats.unpack_e4m3(codes)[numbers].view(torch.int32), expected[numbers].view(torch.int32))


@pytest.mark.parametrize("grid_max", [6.0, 448.0])
def test_scale_is_the_smallest_power_of_two_that_fits(grid_max):
    amax = torch.cat((torch.logspace(-6, 6, 200), grid_max * 2.0 ** torch.arange(-5, 6)))
    scale = formats.e8m0_to_float(formats.e8m0_from_amax(amax, grid_max, 1e-30))
    assert torch.equal(torch.log2(scale), torch.log2(scale).round())
    assert (amax / scale <= grid_max).all()
    assert (amax / (scale / 2) > grid_max).all()


@pytest.mark.parametrize("body", ["fp8", "fp4", "bf16", "fp32"])
@pytest.mark.parametrize("size", [16, 32, 48, 96, 128, 448])
def test_what_training_rounds_to_is_what_the_cache_gives_back(body, size):
    x = torch.randn(3, 5, size + 16) * torch.logspace(-3, 2, 5).view(1, 5, 1)
    layout = EntryLayout(size, body, 16, "bf16")
    packed = pack(x, layout)
    assert packed.shape == (3, 5, layout.nbytes) and packed.dtype == torch.uint8
    expected = torch.cat((round_to_format(x[..., :size], body), round_to_format(x[..., size:], "bf16")), -1)
    assert torch.equal(unpack(packed, layout), expected)
    assert torch.equal(unpack(pack(expected, layout), layout), expected)  # storing twice changes nothing


def test_entry_sizes_are_the_released_ones():
    assert EntryLayout(448, "fp8", 64, "bf16").nbytes == 584
    assert EntryLayout(128, "fp4").nbytes == 68


def test_all_zero_and_tiny_blocks_survive():
    for fmt in ("fp8", "fp4"):
        assert torch.equal(round_to_format(torch.zeros(2, 64), fmt), torch.zeros(2, 64))
        assert round_to_format(torch.full((1, 64), 1e-30), fmt).isfinite().all()


@pytest.mark.parametrize("rows", [1, 2049])
def test_fp4_in_pieces_has_the_readable_bits(rows):
    x = torch.randn(rows, 64) * torch.logspace(-30, 30, rows).unsqueeze(1)
    x[0, :32] = torch.arange(-16, 16) / 4  # ties, and both zeros
    x[0, 0] = -0.0
    for special in (None, 0.0, 1e-45, -1e38, float("inf"), float("nan")):
        if special is not None:
            x[-1, 40] = special
        expected = reference.round_to_format(x, "fp4")
        found = round_to_format(x, "fp4")
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.nan_to_num(0).view(torch.int32), expected.nan_to_num(0).view(torch.int32))
        narrow = fake_quantize(x, "fp4", torch.bfloat16)
        torch.testing.assert_close(narrow.float(), expected, rtol=0, atol=0, equal_nan=True)


def test_fake_quantize_passes_the_gradient_through():
    x = torch.randn(4, 64, requires_grad=True)
    fake_quantize(x, "fp4").backward(torch.arange(256.0).view(4, 64))
    assert torch.equal(x.grad, torch.arange(256.0).view(4, 64))


def test_hadamard_on_both_sides_leaves_products_alone():
    q, k = torch.randn(8, 32, dtype=torch.float64), torch.randn(20, 32, dtype=torch.float64)
    torch.testing.assert_close(hadamard(q) @ hadamard(k).T, q @ k.T)
    torch.testing.assert_close(hadamard(hadamard(q)), q)
    assert not torch.allclose(hadamard(q) @ k.T, q @ k.T, atol=0.1)
    with pytest.raises(ValueError, match="power of two"):
        hadamard(torch.randn(2, 24))


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


def test_fp4_groups_are_the_cache_formats_groups():
    x = torch.randn(5, 7, 96)
    packed, scales = formats.quantize_fp4_groups(x)
    assert packed.shape == (5, 7, 48) and scales.shape == (5, 7, 3) and packed.dtype == scales.dtype == torch.uint8
    assert torch.equal(formats.dequantize_fp4_groups(packed, scales), round_to_format(x, "fp4"))


@pytest.mark.parametrize("scale", [1, 120, 127, 200])
def test_every_fp4_code_under_every_scale_that_it_was_read_with(scale):
    codes = torch.arange(32, dtype=torch.uint8) % 16
    packed = (codes[0::2] | (codes[1::2] << 4)).view(1, 16)
    kept = torch.tensor([[scale]], dtype=torch.uint8)
    values = formats.dequantize_fp4_groups(packed, kept)
    found = formats.quantize_fp4_groups(values, kept)
    assert torch.equal(found[0], packed) and torch.equal(found[1], kept)  # negative zero, code 8, included
    low = torch.where((packed & 0x7) <= 2, packed & 0x7, 0) | torch.where((packed & 0x70) <= 0x20, packed & 0x70, 0)
    values = formats.dequantize_fp4_groups(low, kept)  # at most 1.0: the smallest scale that fits is another
    assert formats.quantize_fp4_groups(values)[1].item() == max(scale - 2, 1)
    found = formats.quantize_fp4_groups(values, kept)
    assert torch.equal(found[0], low) and torch.equal(found[1], kept)
    values[0, 0] = 7 * 2.0 ** (scale - 127)  # no code under the old scale
    assert formats.quantize_fp4_groups(values, kept)[1].item() == scale + 1


@pytest.mark.parametrize("apart", [0, 1, 6, 11, 14])
def test_fp4_becomes_fp8_bit_for_bit(apart):
    torch.manual_seed(apart)
    packed = torch.randint(0, 256, (200, 80), dtype=torch.uint8)  # partial tiles, too
    scales = torch.randint(100, 101 + apart, (200, 5), dtype=torch.uint8)
    scales[0, 0], scales[0, 1] = 100, 100 + apart
    values, tiles = formats.fp4_groups_to_fp8_tiles(packed, scales)
    assert tiles.shape == (2, 2) and tiles[0, 0] == 100 + apart - 6
    expected = formats.dequantize_fp4_groups(packed, scales)
    found = formats.dequantize_fp8_tiles(values, tiles)
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))  # the sign of zero, too


def test_fp4_that_no_fp8_scale_can_hold_is_refused():
    packed = torch.full((128, 64), 0x11, dtype=torch.uint8)  # 0.5 everywhere
    scales = torch.full((128, 4), 100, dtype=torch.uint8)
    scales[3, 2] = 115
    with pytest.raises(ValueError, match=r"tile \[0, 0\]: group scales 2 \*\* 15 apart"):
        formats.fp4_groups_to_fp8_tiles(packed, scales)
    packed[:] = 0x22  # 1.0, whose half step is not needed
    values, tiles = formats.fp4_groups_to_fp8_tiles(packed, scales)
    assert torch.equal(formats.dequantize_fp8_tiles(values, tiles), formats.dequantize_fp4_groups(packed, scales))


@pytest.mark.parametrize("code", [0, 3, 254])
def test_fp4_to_fp8_at_the_ends_of_the_scale_range(code):
    packed = torch.full((4, 16), 0x21, dtype=torch.uint8)
    scales = torch.full((4, 1), code, dtype=torch.uint8)
    values, tiles = formats.fp4_groups_to_fp8_tiles(packed, scales)
    assert torch.equal(formats.dequantize_fp8_tiles(values, tiles), formats.dequantize_fp4_groups(packed, scales))


@pytest.mark.parametrize(
    ("layout", "tokens"), [(EntryLayout(112, "fp8", 16), 9), (EntryLayout(40, "fp4", 8), 1)], ids=["fp8", "fp4"]
)
def test_compiled_code_keeps_every_bit(layout, tokens):
    """Of blocks that are not whole, and of BF16: compilers dropped the one's end and the other's rounding."""
    x = torch.randn(1, tokens, layout.size) * torch.rand(1, tokens, 1).exp()
    compiled = [torch.compile(fn, dynamic=False, fullgraph=True) for fn in (pack, unpack, round_to_format)]
    packed = pack(x, layout)
    assert torch.equal(compiled[0](x, layout), packed)
    assert torch.equal(compiled[1](packed, layout), unpack(packed, layout))
    for fmt in (layout.body_format, "bf16"):
        body = x[..., : layout.body].contiguous()
        assert torch.equal(compiled[2](body, fmt), round_to_format(body, fmt))
