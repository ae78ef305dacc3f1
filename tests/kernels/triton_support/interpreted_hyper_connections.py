"""Run by test_interpreted.py with TRITON_INTERPRET=1."""

import pytest
import torch

from kernels.hyper_connections import hc_head, hc_post, hc_pre


def inputs(tokens, n, d):
    m = 2 * n + n * n
    return torch.randn(2, tokens, n, d), torch.randn(m, n * d) * 0.3, torch.randn(3), torch.randn(m), torch.randn(d)


def run(backend, given, output, iterations=5):
    """Return the outputs of a layer, whose streams are used twice, and the gradients of all inputs."""
    leaves = [x.clone().requires_grad_() for x in (*given, output)]
    *of_pre, out = leaves
    x, post, comb, entered = hc_pre(*of_pre, iterations, 1e-3, 1e-2, backend=backend)
    after = hc_post(entered, comb, post, out + 0 * x, backend=backend)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(y.shape, generator=generator) for y in (x, after)]
    torch.autograd.backward((x, after), upstream)
    return [*(y.detach() for y in (x, post, comb, after)), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize(
    ("tokens", "n", "d", "iterations"), [(1, 4, 20, 20), (9, 2, 33, 1), (3, 1, 16, 2), (0, 4, 16, 2)]
)
def test_a_layer_equals_the_reference_forward_and_backward(tokens, n, d, iterations):
    given, output = inputs(tokens, n, d), torch.randn(2, tokens, d)
    found, expected = (run(backend, given, output, iterations) for backend in ("triton", "reference"))
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("used", ["x", "post", "comb", "streams"])
def test_gradients_of_each_output_alone(used):
    given = inputs(2, 4, 20)
    results = []
    for backend in ("triton", "reference"):
        leaves = [x.clone().requires_grad_() for x in given]
        outputs = dict(zip(("x", "post", "comb", "streams"), hc_pre(*leaves, 3, 1e-3, 1e-2, backend=backend)))
        out = outputs[used]
        out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)))
        results.append([torch.zeros_like(x) if x.grad is None else x.grad for x in leaves])
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=2e-5)


def test_the_input_of_the_block_is_recomputed_not_saved():
    tokens, n, d, saved = 3, 4, 20, []
    leaves = [x.clone().requires_grad_() for x in inputs(tokens, n, d)]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        hc_pre(*leaves, 3, 1e-3, 1e-6, backend="triton")
    m = 2 * n + n * n
    assert sorted(x.numel() for x in saved) == sorted([*(x.numel() for x in leaves), 2 * tokens * m, 2 * tokens])


def test_inputs_near_zero_are_bounded_by_eps():
    """Streams that nearly cancel in the weighted sum, and streams of zeros."""
    streams = torch.randn(2, 3, 2, 20)
    streams[:, :, 1] = -streams[:, :, 0] * (1 + 1e-4)
    streams[0, 0] = 0
    fn, scale, base, weight = torch.randn(8, 40) * 0.3, torch.zeros(3), torch.zeros(8), torch.randn(20)
    found, expected = (
        run(
            backend,
            (streams, fn, scale, base, weight),
            torch.randn(2, 3, 20, generator=torch.Generator().manual_seed(2)),
        )
        for backend in ("triton", "reference")
    )
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)


def test_outputs_in_bf16():
    given, output = inputs(2, 4, 20), torch.randn(2, 2, 20).bfloat16()
    leaves = [x.clone().requires_grad_() for x in (given[0], torch.rand(2, 2, 4, 4), torch.rand(2, 2, 4), output)]
    found, expected = hc_post(*leaves, backend="triton"), hc_post(*leaves, backend="reference")
    torch.testing.assert_close(found, expected)
    upstream = torch.randn(found.shape)
    for x, y in zip(torch.autograd.grad(found, leaves, upstream), torch.autograd.grad(expected, leaves, upstream)):
        assert x.dtype == y.dtype
        torch.testing.assert_close(x, y, rtol=0.02, atol=1e-4)


def test_the_head_and_unsupported_streams():
    streams = torch.randn(1, 2, 2, 8)
    given = streams, torch.randn(2, 16), torch.randn(1), torch.randn(2), 1e-3, 1e-6
    torch.testing.assert_close(hc_head(*given, backend="triton"), hc_head(*given, backend="reference"))
    with pytest.raises(ValueError, match=r"supports numbers of streams 1, 2, 4; found 3$"):
        of_pre = torch.zeros(15, 24), torch.zeros(3), torch.zeros(15), torch.zeros(8)
        hc_pre(torch.randn(1, 2, 3, 8), *of_pre, 1, 0.1, 0.1, "triton")
    with pytest.raises(ValueError, match=r"supports dtypes float32; found bfloat16$"):
        hc_head(streams.bfloat16(), *given[1:], backend="triton")
