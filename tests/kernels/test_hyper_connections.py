import pytest
import torch

from kernels.hyper_connections import BACKENDS, backend_for, collapse, enter, expand, mixing_weights, sinkhorn


def test_mixing_matrix_is_doubly_stochastic():
    comb = sinkhorn(torch.randn(4, 4, 100) * 2, iterations=20, eps=1e-6)
    torch.testing.assert_close(comb.sum(0), torch.ones(4, 100), atol=1e-4, rtol=0)
    torch.testing.assert_close(comb.sum(1), torch.ones(4, 100), atol=5e-2, rtol=0)  # the last step was a column's
    assert (comb.sum(1) - 1).abs().mean() < 2e-3
    assert (comb > 0).all()
    assert (sinkhorn(torch.randn(4, 4, 100) * 2, 1, 1e-6).sum(1) - 1).abs().max() > 0.1  # one pass is not enough


def test_mixing_weights_follow_the_formula():
    n, d = 4, 8
    streams, fn = torch.randn(2, 3, n, d), torch.randn(2 * n + n * n, n * d)
    scale, base = torch.tensor([0.3, 0.5, 0.7]), torch.randn(2 * n + n * n)
    pre, post, comb = mixing_weights(streams, fn, scale, base, 20, 1e-6, 1e-6)
    x = streams[1, 2].flatten()
    raw = fn @ (x / (x.square().mean() + 1e-6).sqrt())
    torch.testing.assert_close(pre[1, 2], torch.sigmoid(0.3 * raw[:n] + base[:n]) + 1e-6)
    torch.testing.assert_close(post[1, 2], 2 * torch.sigmoid(0.5 * raw[n : 2 * n] + base[n : 2 * n]))
    matrix = torch.softmax((0.7 * raw[2 * n :] + base[2 * n :]).view(n, n), -1) + 1e-6
    matrix = matrix / (matrix.sum(0, keepdim=True) + 1e-6)
    for _ in range(19):
        matrix = matrix / (matrix.sum(1, keepdim=True) + 1e-6)
        matrix = matrix / (matrix.sum(0, keepdim=True) + 1e-6)
    torch.testing.assert_close(comb[1, 2], matrix, rtol=1e-4, atol=1e-5)


def test_expand_applies_the_transposed_matrix():
    streams, comb = torch.randn(1, 1, 4, 8), torch.rand(1, 1, 4, 4)
    post, output = torch.rand(1, 1, 4), torch.randn(1, 1, 8)
    out = expand(streams, comb, post, output)
    for k in range(4):
        expected = sum(comb[0, 0, j, k] * streams[0, 0, j] for j in range(4)) + post[0, 0, k] * output[0, 0]
        torch.testing.assert_close(out[0, 0, k], expected)


@pytest.mark.parametrize("tokens", [1, 700])
def test_other_backends_equal_the_reference_forward_and_backward(tokens):
    assert backend_for(torch.zeros(1)) == "batched"
    torch.manual_seed(0)
    inputs = [
        torch.randn(2, tokens, 4, 96),
        torch.rand(2, tokens, 4, 4),
        torch.rand(2, tokens, 4),
        torch.randn(2, tokens, 96),
    ]
    results = {}
    for backend in BACKENDS:
        leaves = [t.clone().requires_grad_() for t in inputs]
        expanded = expand(*leaves, backend=backend)
        collapsed = collapse(expanded, leaves[2], backend=backend)
        collapsed.backward(torch.linspace(-1, 1, collapsed.numel()).view_as(collapsed))
        results[backend] = [expanded, collapsed, *(leaf.grad for leaf in leaves)]
    for slow, *others in zip(*(results[backend] for backend in BACKENDS)):
        for fast in others:
            torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-4)


def test_other_mixing_weights_equal_the_reference_forward_and_backward():
    torch.manual_seed(0)
    inputs = [torch.randn(2, 700, 4, 16), torch.randn(24, 64), torch.tensor([0.4, 0.6, 0.8]), torch.randn(24)]
    results = {}
    for backend in BACKENDS:
        leaves = [t.clone().requires_grad_() for t in inputs]
        outputs = mixing_weights(*leaves, 20, 1e-6, 1e-6, backend=backend)
        sum((out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum() for out in outputs).backward()
        results[backend] = [*outputs, *(leaf.grad for leaf in leaves)]
    for slow, *others in zip(*(results[backend] for backend in BACKENDS)):
        for fast in others:
            torch.testing.assert_close(fast, slow, rtol=1e-3, atol=1e-4)


def test_a_block_s_way_in_and_out_equals_the_reference_forward_and_backward():
    """Twice over, as in a layer, with the inner outputs used for more than one thing."""
    torch.manual_seed(0)
    inputs = [torch.randn(2, 700, 4, 16), torch.randn(24, 64), torch.tensor([0.4, 0.6, 0.8]), torch.randn(24)]
    results = {}
    for backend in BACKENDS:
        leaves = [t.clone().requires_grad_() for t in inputs]
        streams, *weights = leaves
        for _ in range(2):
            x, post, comb, entered = enter(streams, *weights, 20, 1e-6, 1e-6, backend=backend)
            streams = expand(entered, comb, post, x.sin(), backend=backend)
        read = collapse(streams, post, backend=backend)
        (read.square().sum() + (streams * torch.linspace(-1, 1, streams.numel()).view_as(streams)).sum()).backward()
        results[backend] = [streams, *(leaf.grad for leaf in leaves)]
    for slow, *others in zip(*(results[backend] for backend in BACKENDS)):
        for fast in others:
            torch.testing.assert_close(fast, slow, rtol=1e-3, atol=1e-3)


def test_only_the_input_of_a_block_may_be_used():
    """Gradients of parts that nothing came back for are the others' alone."""
    inputs = [torch.randn(1, 5, 4, 16), torch.randn(24, 64), torch.tensor([0.4, 0.6, 0.8]), torch.randn(24)]
    for used in range(4):
        results = []
        for backend in ("reference", "batched"):
            leaves = [t.clone().requires_grad_() for t in inputs]
            enter(*leaves, 20, 1e-6, 1e-6, backend=backend)[used].sin().sum().backward()
            results.append([leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for leaf in leaves])
        torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)
