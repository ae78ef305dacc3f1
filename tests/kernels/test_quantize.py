import pytest
import torch
from backend_testing import available, needs_native

from kernels.cache_io import EntryLayout
from kernels.quantize import BACKENDS, fake_quantize, round_to_format, round_to_layout


def test_all_zero_and_tiny_blocks():
    for fmt in ("fp8", "fp8_128", "fp4"):
        assert torch.equal(round_to_format(torch.zeros(2, 64), fmt), torch.zeros(2, 64))
        assert round_to_format(torch.full((1, 64), 1e-30), fmt).isfinite().all()


@pytest.mark.parametrize("backend", [name for name in available(BACKENDS) if name != "reference"])
@pytest.mark.parametrize("rows", [1, 2049])
def test_other_backends_equal_the_reference_in_fp4_bit_for_bit(rows, backend):
    x = torch.randn(rows, 64) * torch.logspace(-30, 30, rows).unsqueeze(1)
    x[0, :32] = torch.arange(-16, 16) / 4  # ties and signed zeros
    x[0, 0] = -0.0
    for special in (None, 0.0, 1e-45, -1e38, float("inf"), float("nan")):
        if special is not None:
            x[-1, 40] = special
        expected = round_to_format(x, "fp4", backend="reference")
        found = round_to_format(x, "fp4", backend=backend)
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.nan_to_num(0).view(torch.int32), expected.nan_to_num(0).view(torch.int32))
        narrow = fake_quantize(x, "fp4", torch.bfloat16)
        torch.testing.assert_close(narrow.float(), expected, rtol=0, atol=0, equal_nan=True)


def test_fake_quantize_passes_the_gradient_through():
    x = torch.randn(4, 64, requires_grad=True)
    fake_quantize(x, "fp4").backward(torch.arange(256.0).view(4, 64))
    assert torch.equal(x.grad, torch.arange(256.0).view(4, 64))


def test_eager_refuses_what_it_does_not_support():
    for x, fmt in ((torch.randn(2, 64), "fp8"), (torch.randn(2, 40), "fp4")):
        with pytest.raises(ValueError, match=f"requires fp4 and a multiple of 32 dims, found {fmt} and {x.shape[1]}"):
            round_to_format(x, fmt, backend="eager")
    with pytest.raises(ValueError, match="format 'fp5' is not one of fp32, bf16, fp8, fp8_128, fp4"):
        round_to_format(torch.randn(2, 64), "fp5")


@pytest.mark.parametrize("backend", [name for name in available(BACKENDS) if name != "eager"])
def test_layouts_round_body_and_rope_with_a_straight_through_gradient(backend):
    layout = EntryLayout(32, "fp4", 8, "bf16")
    x = torch.randn(3, 40, requires_grad=True)
    out = round_to_layout(x, layout, backend)
    expected = torch.cat((round_to_format(x[:, :32], "fp4"), round_to_format(x[:, 32:], "bf16")), dim=-1)
    assert torch.equal(out, expected)
    out.backward(torch.ones(3, 40))
    assert torch.equal(x.grad, torch.ones(3, 40))
    with torch.no_grad():
        assert torch.equal(round_to_layout(x, layout, backend), expected)


@needs_native
def test_cpu_propagates_nan():
    x = torch.randn(1, 3, 64)
    x[0, 1, 5] = float("nan")
    assert round_to_format(x, "fp8", backend="cpu")[0, 1, 5].isnan()
