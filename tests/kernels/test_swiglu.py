import pytest
import torch
import torch.nn.functional as F
from backend_testing import available, needs_native, output_and_gradients

from kernels.swiglu import BACKENDS, swiglu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eager_equals_the_reference_forward_and_backward(dtype):
    gate, up, gain = 2 * torch.randn(3, 7, 16), 2 * torch.randn(3, 7, 16), torch.rand(3, 7, 1)
    gate[0, 0, 0], up[0, 0, :2] = 1.5, torch.tensor([1.5, -1.5])  # values at the limit pass gradients
    for inputs in ((gate.to(dtype), up.to(dtype)), (gate.to(dtype), up.to(dtype), gain)):
        found, expected = (
            output_and_gradients(lambda gate, up, *gain, b=b: swiglu(gate, up, 1.5, *gain, backend=b), *inputs)
            for b in ("eager", "reference")
        )
        tolerance = {} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
        torch.testing.assert_close(found, expected, **tolerance)


@pytest.mark.parametrize("backend", available(BACKENDS))
def test_inputs_are_clamped(backend):
    gate, up = torch.tensor([50.0, -50.0, 1.0]), torch.tensor([20.0, -20.0, 2.0])
    limited = swiglu(gate, up, 10.0, backend=backend)
    torch.testing.assert_close(limited, F.silu(torch.tensor([10.0, -50.0, 1.0])) * torch.tensor([10.0, -10.0, 2.0]))


@needs_native
@pytest.mark.parametrize("size", [1, 7, 64, 513])
@torch.no_grad()
def test_cpu_equals_the_reference(size):
    gate, up = torch.randn(2, 3, size) * 9, torch.randn(2, 3, size) * 9
    found, expected = (swiglu(gate, up, 10.0, backend=b) for b in ("cpu", "reference"))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@needs_native
def test_cpu_propagates_nan_and_refuses_a_gain():
    x, ones = torch.randn(1, 3, 64), torch.ones(1, 3, 64)
    x[0, 1, 5] = float("nan")
    assert swiglu(x, ones, 10.0, backend="cpu")[0, 1, 5].isnan()
    assert swiglu(ones, x, 10.0, backend="cpu")[0, 1, 5].isnan()
    with pytest.raises(ValueError, match="the cpu backend does not support a gain"):
        swiglu(x, ones, 10.0, torch.ones(1, 3, 1), backend="cpu")
