import contextlib

import pytest
import torch
from backend_testing import available, needs_native
from torch.multiprocessing.reductions import StorageWeakRef

from kernels.hyper_connections import (
    BACKENDS,
    RecomputedStreams,
    backend_for,
    hc_head,
    hc_post,
    hc_pre,
    sinkhorn,
)

AVAILABLE = available(BACKENDS)


def test_mixing_matrix_is_doubly_stochastic():
    comb = sinkhorn(torch.randn(4, 4, 100) * 2, iterations=20, eps=1e-6)
    torch.testing.assert_close(comb.sum(0), torch.ones(4, 100), atol=1e-4, rtol=0)
    torch.testing.assert_close(comb.sum(1), torch.ones(4, 100), atol=5e-2, rtol=0)  # the last step divides columns
    assert (comb.sum(1) - 1).abs().mean() < 2e-3
    assert (comb > 0).all()
    assert (sinkhorn(torch.randn(4, 4, 100) * 2, 1, 1e-6).sum(1) - 1).abs().max() > 0.1  # one iteration is not enough


def test_hc_pre_follows_the_formula():
    n, d = 4, 8
    streams, fn = torch.randn(2, 3, n, d), torch.randn(2 * n + n * n, n * d)
    scale, base = torch.tensor([0.3, 0.5, 0.7]), torch.randn(2 * n + n * n)
    norm_weight = torch.randn(d)
    x, post, comb, through = hc_pre(streams, fn, scale, base, norm_weight, 20, 1e-6, 1e-6)
    assert torch.equal(through, streams)
    flat = streams[1, 2].flatten()
    raw = fn @ (flat / (flat.square().mean() + 1e-6).sqrt())
    mixed = (torch.sigmoid(0.3 * raw[:n] + base[:n]) + 1e-6) @ streams[1, 2]
    torch.testing.assert_close(x[1, 2], mixed / (mixed.square().mean() + 1e-6).sqrt() * norm_weight)
    torch.testing.assert_close(post[1, 2], 2 * torch.sigmoid(0.5 * raw[n : 2 * n] + base[n : 2 * n]))
    matrix = torch.softmax((0.7 * raw[2 * n :] + base[2 * n :]).view(n, n), -1) + 1e-6
    matrix = matrix / (matrix.sum(0, keepdim=True) + 1e-6)
    for _ in range(19):
        matrix = matrix / (matrix.sum(1, keepdim=True) + 1e-6)
        matrix = matrix / (matrix.sum(0, keepdim=True) + 1e-6)
    torch.testing.assert_close(comb[1, 2], matrix, rtol=1e-4, atol=1e-5)


def test_hc_head_follows_the_formula():
    streams, fn, scale, base = torch.randn(2, 3, 4, 8), torch.randn(4, 32), torch.tensor([0.3]), torch.randn(4)
    flat = streams[1, 2].flatten()
    raw = fn @ (flat / (flat.square().mean() + 1e-6).sqrt())
    expected = (torch.sigmoid(0.3 * raw + base) + 1e-6) @ streams[1, 2]
    torch.testing.assert_close(hc_head(streams, fn, scale, base, 1e-6, 1e-6)[1, 2], expected)


def test_hc_post_applies_the_transposed_matrix():
    streams, comb = torch.randn(1, 1, 4, 8), torch.rand(1, 1, 4, 4)
    post, output = torch.rand(1, 1, 4), torch.randn(1, 1, 8)
    out = hc_post(streams, comb, post, output)
    for k in range(4):
        expected = sum(comb[0, 0, j, k] * streams[0, 0, j] for j in range(4)) + post[0, 0, k] * output[0, 0]
        torch.testing.assert_close(out[0, 0, k], expected)


def assert_backends_agree(run, inputs, tolerance):
    """Compare the outputs of ``run(backend, *leaves)`` and the gradients of their weighted sum for all backends."""
    results = {}
    for backend in AVAILABLE:
        leaves = [t.clone().requires_grad_() for t in inputs]
        outputs = run(backend, *leaves)
        sum((out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum() for out in outputs).backward()
        gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
        results[backend] = [*outputs, *gradients]
    for backend in AVAILABLE:
        torch.testing.assert_close(results[backend], results["reference"], rtol=tolerance, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 700])
def test_other_backends_equal_the_reference_forward_and_backward(tokens):
    assert backend_for(torch.zeros(1, 1, 4, 8)) == ("cpu" if "cpu" in AVAILABLE else "eager")
    shapes = ((2, tokens, 4, 96), (2, tokens, 4, 4), (2, tokens, 4), (2, tokens, 96), (4, 4 * 96), (1,), (4,))
    streams, comb, post, output, *of_head = map(torch.randn, shapes)

    def run(backend, streams, comb, post, output, *of_head):
        expanded = hc_post(streams, comb, post, output, backend=backend)
        return expanded, hc_head(expanded, *of_head, 1e-6, 1e-6, backend=backend)

    assert_backends_agree(run, (streams, comb.sigmoid(), post.sigmoid(), output, *of_head), 1e-3)


def weights(n=4, d=16):
    m = 2 * n + n * n
    return torch.randn(m, n * d), torch.tensor([0.4, 0.6, 0.8]), torch.randn(m), torch.randn(d)


@pytest.mark.parametrize("used", [slice(None), 0, 1, 2, 3])
def test_hc_pre_equals_the_reference_for_every_subset_of_used_outputs(used):
    def run(backend, *leaves):
        outputs = hc_pre(*leaves, 20, 1e-6, 1e-6, backend=backend)
        return outputs if isinstance(used, slice) else outputs[used : used + 1]

    assert_backends_agree(run, (torch.randn(2, 700, 4, 16), *weights()), 1e-3)


def test_two_blocks_in_a_row_equal_the_reference():
    def run(backend, streams, output, *weights):
        for _ in range(2):
            x, post, comb, entered = hc_pre(streams, *weights, 20, 1e-6, 1e-6, backend=backend)
            streams = hc_post(entered, comb, post, x.sin() + output, backend=backend)
        return streams, x

    assert_backends_agree(run, (torch.randn(2, 70, 4, 16), torch.randn(2, 70, 16), *weights()), 1e-3)


@pytest.mark.parametrize("backend", AVAILABLE)
def test_incoming_gradients_are_not_modified(backend):
    """With and without a gradient of the input of the block."""
    streams, *of_enter = torch.randn(2, 7, 4, 16), *weights()
    x, post, _, entered = hc_pre(streams.requires_grad_(), *of_enter, 20, 1e-6, 1e-6, backend=backend)
    for other in (x, post):
        given = torch.randn_like(streams)
        kept = given.clone()
        torch.autograd.backward([other, entered], [torch.ones_like(other), given], retain_graph=True)
        assert torch.equal(given, kept)


@pytest.mark.parametrize("backend", [name for name in AVAILABLE if name != "reference"])
@pytest.mark.parametrize("iterations", [1, 2, 20])
def test_sinkhorn_saves_only_its_logits(iterations, backend):
    saved = []
    streams, *of_enter = torch.randn(1, 1100, 4, 16), *weights()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        outputs = hc_pre(streams.requires_grad_(), *of_enter, iterations, 1e-6, 1e-6, backend=backend)
    nodes, seen = [out.grad_fn for out in outputs], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            assert not any(isinstance(x, list | tuple | torch.Tensor) for x in getattr(node, "__dict__", {}).values())
            nodes += [later for later, _ in node.next_functions]
    distinct = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in saved}
    assert sum(distinct.values()) < 2.5 * streams.untyped_storage().nbytes()


@pytest.mark.parametrize("narrow", [False, True])
def test_recomputed_streams_are_not_saved_and_gradients_are_equal(narrow):
    """Two halves of a layer, with the streams between them saved or recomputed."""
    inputs = (torch.randn(2, 70, 4, 16), torch.randn(2, 70, 16), *weights())
    found = []
    for again in (False, True):
        leaves = [t.clone().requires_grad_() for t in inputs]
        streams, output, *of_enter = leaves
        output = output.bfloat16() if narrow else output
        x, post, comb, entered = hc_pre(streams, *of_enter, 20, 1e-6, 1e-6)
        between = hc_post(entered, comb, post, x.sin().to(output.dtype) + output)
        between_lives = StorageWeakRef(between.untyped_storage())
        recomputed = RecomputedStreams(between, entered, comb, post, x.detach().sin().to(output.dtype) + output)
        with recomputed.not_saved() if again else contextlib.nullcontext():
            x, post, comb, entered = hc_pre(between, *of_enter, 20, 1e-6, 1e-6)
            streams = hc_post(entered, comb, post, x.cos())
        del between, entered
        assert between_lives.expired() == again
        loss = (streams * streams.detach().sign()).sum() + x.sum()
        with torch.autocast("cpu", torch.bfloat16):  # unlike the forward pass
            loss.backward()
        found.append([streams, *(leaf.grad for leaf in leaves)])
    assert all(map(torch.equal, *found))


def test_a_forward_pass_without_a_backward_pass_is_freed():
    streams, *of_enter = torch.randn(2, 7, 4, 16), *(w.requires_grad_() for w in weights())
    x, post, comb, entered = hc_pre(streams, *of_enter, 20, 1e-6, 1e-6)
    between = hc_post(entered, comb, post, x)
    with RecomputedStreams(between, entered, comb, post, x).not_saved():
        outputs = hc_pre(between, *of_enter, 20, 1e-6, 1e-6)
        outputs = (*outputs, hc_post(outputs[3], outputs[2], outputs[1], outputs[0].cos()))
    lives = [StorageWeakRef(t.untyped_storage()) for t in (x, comb, between, *outputs)]
    del x, post, comb, entered, between, outputs
    assert all(each.expired() for each in lives)


# --- native operators


def gradients(backend, inputs, iterations, output_dtype):
    streams, fn, scale, base, norm_weight, output = (x.clone().requires_grad_() for x in inputs)
    x, post, comb, entered = hc_pre(streams, fn, scale, base, norm_weight, iterations, 1e-6, 1e-6, backend)
    out = hc_post(entered, comb, post, output.to(output_dtype) + x.to(output_dtype), backend)
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
    grads = torch.autograd.grad((out * probe).sum(), (streams, fn, scale, base, norm_weight, output))
    return (x, post, comb, out, *grads)


@needs_native
@pytest.mark.parametrize("output_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "n", "d"), [(1, 4, 8), (17, 4, 33), (40, 4, 300), (9, 2, 16), (20, 3, 5)])
def test_cpu_equals_the_reference_for_all_shapes(tokens, n, d, output_dtype):
    weights = 2 * n + n * n
    inputs = [torch.randn(s) for s in ((2, tokens, n, d), (weights, n * d), (3,), (weights,), (d,), (2, tokens, d))]
    inputs[1] /= (n * d) ** 0.5
    found, expected = (gradients(b, inputs, 20, output_dtype) for b in ("cpu", "reference"))
    names = ("x", "post", "comb", "out", "streams", "fn", "scale", "base", "norm_weight", "output")
    for name, a, b in zip(names, found, expected, strict=True):
        bound = (2e-2 if output_dtype == torch.bfloat16 else 2e-4) * float(b.detach().abs().max()) + 1e-6
        assert (a - b).abs().max() <= bound, (name, (a - b).abs().max(), bound)
    with torch.no_grad():
        without_gradients = hc_pre(*inputs[:5], 20, 1e-6, 1e-6, "cpu")
    torch.testing.assert_close(without_gradients[0], found[0], rtol=1e-4, atol=1e-5)
    base, scale = torch.randn(n), torch.randn(1)
    arguments = inputs[0], inputs[1][:n], scale, base, 1e-6, 1e-6
    with torch.no_grad():
        found, expected = (hc_head(*arguments, backend=b) for b in ("cpu", "reference"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@needs_native
@torch.no_grad()
def test_cpu_propagates_nan_and_refuses_misfits():
    streams, fn = torch.randn(1, 2, 4, 8), torch.randn(24, 32)
    streams[0, 0, 0, 0] = float("nan")
    outputs = hc_pre(streams, fn, torch.ones(3), torch.zeros(24), torch.ones(8), 20, 1e-6, 1e-6, "cpu")
    assert all(part[0, 0].isnan().any() and not part[0, 1].isnan().any() for part in outputs[:3])
    with pytest.raises(ValueError, match="fn of the head has 9 rows"):
        hc_head(streams, torch.randn(9, 32), torch.ones(1), torch.zeros(9), 1e-6, 1e-6, backend="cpu")
