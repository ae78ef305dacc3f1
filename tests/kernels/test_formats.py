import itertools

import pytest
import torch

from kernels import formats
from kernels.cache_io import EntryLayout, pack, unpack
from kernels.quantize import fake_quantize, hadamard, round_to_format


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
