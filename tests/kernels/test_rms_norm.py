import pytest
import torch
from backend_testing import available, needs_native, output_and_gradients

from kernels.rms_norm import BACKENDS, rms_norm


@pytest.mark.parametrize("backend", [name for name in available(BACKENDS) if name != "reference"])
@pytest.mark.parametrize("shape", [(3, 5, 16), (16,), (0, 16), (2, 67, 7), (130, 1), (2, 3, 513)])
def test_other_backends_equal_the_reference_forward_and_backward(shape, backend):
    x, weight = 9 * torch.randn(shape), torch.randn(shape[-1])
    for inputs in ((x,), (x, weight), (x.bfloat16(),), (x.bfloat16(), weight)):
        found, expected = (
            output_and_gradients(lambda x, *weight, b=b: rms_norm(x, 1e-3, *weight, backend=b), *inputs)
            for b in (backend, "reference")
        )
        assert [t.dtype for t in found] == [t.dtype for t in expected]
        rtol = 1e-4 if inputs[0] is x else 1e-2  # gradients in BF16 may round to a neighbor
        torch.testing.assert_close(found, expected, rtol=rtol, atol=1e-4)


def test_normalized_rows_have_a_mean_square_of_one():
    x, weight = 3 * torch.randn(4, 64), torch.randn(64)
    out = rms_norm(x, 0.0)
    torch.testing.assert_close(out.square().mean(-1), torch.ones(4))
    torch.testing.assert_close(out / x, (out / x)[:, :1].expand(4, 64))
    torch.testing.assert_close(rms_norm(x, 0.0, weight), out * weight)


@needs_native
def test_cpu_takes_strided_inputs_and_gradients():
    x, weight = torch.randn(16, 6, 5).transpose(0, 2), torch.randn(16)
    upstream = torch.randn(16, 6, 5).transpose(0, 2)
    gradients = []
    for backend in ("cpu", "reference"):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        rms_norm(leaves[0], 1e-3, leaves[1], backend=backend).backward(upstream)
        gradients.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(*gradients)


@needs_native
def test_gradient_of_the_weight_does_not_depend_on_the_number_of_threads():
    x, weight = torch.randn(1000, 64), torch.randn(64)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(output_and_gradients(lambda x, w: rms_norm(x, 1e-3, w, backend="cpu"), x, weight))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=0)
