import pytest
import torch
from backend_testing import needs_native, output_and_gradients

from kernels.rms_norm import rms_norm


@pytest.mark.parametrize("shape", [(3, 5, 16), (16,), (0, 16)])
def test_eager_equals_the_reference_forward_and_backward(shape):
    x, weight = torch.randn(shape), torch.randn(16)
    for inputs in ((x,), (x, weight), (x.bfloat16(), weight)):
        found, expected = (
            output_and_gradients(lambda x, *weight, b=backend: rms_norm(x, 1e-3, *weight, backend=b), *inputs)
            for backend in ("eager", "reference")
        )
        torch.testing.assert_close(found, expected)


def test_normalized_rows_have_a_mean_square_of_one():
    x, weight = 3 * torch.randn(4, 64), torch.randn(64)
    out = rms_norm(x, 0.0)
    torch.testing.assert_close(out.square().mean(-1), torch.ones(4))
    torch.testing.assert_close(out / x, (out / x)[:, :1].expand(4, 64))
    torch.testing.assert_close(rms_norm(x, 0.0, weight), out * weight)


@needs_native
@pytest.mark.parametrize("size", [1, 7, 64, 513])
@torch.no_grad()
def test_cpu_equals_the_reference(size):
    x, weight = torch.randn(2, 3, size) * 9, torch.randn(size)
    for given in (None, weight):
        found, expected = (rms_norm(x, 1e-3, given, backend=b) for b in ("cpu", "reference"))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
