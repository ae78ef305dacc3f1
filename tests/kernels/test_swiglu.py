import pytest
import torch
import torch.nn.functional as F
from backend_testing import available, needs_native, output_and_gradients

from kernels.swiglu import BACKENDS, swiglu


@pytest.mark.parametrize("backend", [name for name in available(BACKENDS) if name != "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 7, 16), (1, 3), (0, 16), (2, 3, 513)])
def test_other_backends_equal_the_reference_forward_and_backward(shape, dtype, backend):
    gate, up, gain = 2 * torch.randn(shape), 2 * torch.randn(shape), torch.rand(*shape[:-1], 1)
    gate[..., 0], up[..., :2] = 1.5, torch.tensor([1.5, -1.5])  # values at the limit pass gradients
    for inputs in ((gate.to(dtype), up.to(dtype)), (gate.to(dtype), up.to(dtype), gain)):
        found, expected = (
            output_and_gradients(lambda gate, up, *gain, b=b: swiglu(gate, up, 1.5, *gain, backend=b), *inputs)
            for b in (backend, "reference")
        )
        assert [t.dtype for t in found] == [t.dtype for t in expected]
        tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
        torch.testing.assert_close(found, expected, **tolerance)


@pytest.mark.parametrize("backend", available(BACKENDS))
def test_inputs_are_clamped(backend):
    gate, up = torch.tensor([50.0, -50.0, 1.0]), torch.tensor([20.0, -20.0, 2.0])
    limited = swiglu(gate, up, 10.0, backend=backend)
    torch.testing.assert_close(limited, F.silu(torch.tensor([10.0, -50.0, 1.0])) * torch.tensor([10.0, -10.0, 2.0]))


@needs_native
def test_cpu_takes_strided_inputs_and_gradients():
    def run(backend):
        gate, up = (x.clone().requires_grad_() for x in given)
        swiglu(gate, up, 10.0, backend=backend).backward(upstream)
        return gate.grad, up.grad

    given, upstream = torch.randn(2, 64, 6).transpose(1, 2), torch.randn(64, 6).T
    torch.testing.assert_close(run("cpu"), run("reference"))


@needs_native
def test_cpu_propagates_nan():
    ones = torch.ones(1, 3, 64)
    bad = ones.clone()
    bad[0, 1, 5] = float("nan")
    for inputs in ((bad, ones), (ones, bad)):
        for tensor in output_and_gradients(lambda gate, up: swiglu(gate, up, 10.0, backend="cpu"), *inputs)[:2]:
            assert tensor[0, 1, 5].isnan() and tensor.isnan().sum() == 1


@needs_native
def test_cpu_refuses_shapes_and_dtypes_that_do_not_match():
    x = torch.ones(2, 3, 8)
    for arguments in ((x, x[..., :4], 10.0), (x, x.bfloat16(), 10.0), (x, x, 10.0, torch.ones(3, 1))):
        with pytest.raises(ValueError, match=r"swiglu: gate .* do not match"):
            swiglu(*arguments, backend="cpu")
