import contextlib

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from kernels import native
from kernels.hyper_connections import BACKENDS as ALL
from kernels.hyper_connections import RecomputedStreams, backend_for, enter, expand, head, sinkhorn

BACKENDS = [name for name in ALL if name != "cpu" or native.level() is not None]


def test_mixing_matrix_is_doubly_stochastic():
    comb = sinkhorn(torch.randn(4, 4, 100) * 2, iterations=20, eps=1e-6)
    torch.testing.assert_close(comb.sum(0), torch.ones(4, 100), atol=1e-4, rtol=0)
    torch.testing.assert_close(comb.sum(1), torch.ones(4, 100), atol=5e-2, rtol=0)  # the last step was a column's
    assert (comb.sum(1) - 1).abs().mean() < 2e-3
    assert (comb > 0).all()
    assert (sinkhorn(torch.randn(4, 4, 100) * 2, 1, 1e-6).sum(1) - 1).abs().max() > 0.1  # one pass is not enough


def test_the_way_into_a_block_follows_the_formula():
    n, d = 4, 8
    streams, fn = torch.randn(2, 3, n, d), torch.randn(2 * n + n * n, n * d)
    scale, base = torch.tensor([0.3, 0.5, 0.7]), torch.randn(2 * n + n * n)
    x, post, comb, through = enter(streams, fn, scale, base, 20, 1e-6, 1e-6)
    assert torch.equal(through, streams)
    flat = streams[1, 2].flatten()
    raw = fn @ (flat / (flat.square().mean() + 1e-6).sqrt())
    torch.testing.assert_close(x[1, 2], (torch.sigmoid(0.3 * raw[:n] + base[:n]) + 1e-6) @ streams[1, 2])
    torch.testing.assert_close(post[1, 2], 2 * torch.sigmoid(0.5 * raw[n : 2 * n] + base[n : 2 * n]))
    matrix = torch.softmax((0.7 * raw[2 * n :] + base[2 * n :]).view(n, n), -1) + 1e-6
    matrix = matrix / (matrix.sum(0, keepdim=True) + 1e-6)
    for _ in range(19):
        matrix = matrix / (matrix.sum(1, keepdim=True) + 1e-6)
        matrix = matrix / (matrix.sum(0, keepdim=True) + 1e-6)
    torch.testing.assert_close(comb[1, 2], matrix, rtol=1e-4, atol=1e-5)


def test_the_head_follows_the_formula():
    streams, fn, scale, base = torch.randn(2, 3, 4, 8), torch.randn(4, 32), torch.tensor([0.3]), torch.randn(4)
    flat = streams[1, 2].flatten()
    raw = fn @ (flat / (flat.square().mean() + 1e-6).sqrt())
    expected = (torch.sigmoid(0.3 * raw + base) + 1e-6) @ streams[1, 2]
    torch.testing.assert_close(head(streams, fn, scale, base, 1e-6, 1e-6)[1, 2], expected)


def test_expand_applies_the_transposed_matrix():
    streams, comb = torch.randn(1, 1, 4, 8), torch.rand(1, 1, 4, 4)
    post, output = torch.rand(1, 1, 4), torch.randn(1, 1, 8)
    out = expand(streams, comb, post, output)
    for k in range(4):
        expected = sum(comb[0, 0, j, k] * streams[0, 0, j] for j in range(4)) + post[0, 0, k] * output[0, 0]
        torch.testing.assert_close(out[0, 0, k], expected)


def assert_alike(run, inputs, tolerance):
    """``run(backend, *leaves)`` gives outputs, whose weighted sum is differentiated: the same in all backends."""
    results = {}
    for backend in BACKENDS:
        leaves = [t.clone().requires_grad_() for t in inputs]
        outputs = run(backend, *leaves)
        sum((out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum() for out in outputs).backward()
        gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
        results[backend] = [*outputs, *gradients]
    for backend in BACKENDS:
        torch.testing.assert_close(results[backend], results["reference"], rtol=tolerance, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 700])
def test_other_backends_equal_the_reference_forward_and_backward(tokens):
    assert backend_for(torch.zeros(1, 1, 4, 8)) == ("cpu" if "cpu" in BACKENDS else "batched")
    shapes = ((2, tokens, 4, 96), (2, tokens, 4, 4), (2, tokens, 4), (2, tokens, 96), (4, 4 * 96), (1,), (4,))
    streams, comb, post, output, *of_head = map(torch.randn, shapes)

    def run(backend, streams, comb, post, output, *of_head):
        expanded = expand(streams, comb, post, output, backend=backend)
        return expanded, head(expanded, *of_head, 1e-6, 1e-6, backend=backend)

    assert_alike(run, (streams, comb.sigmoid(), post.sigmoid(), output, *of_head), 1e-3)


def weights(n=4, d=16):
    return torch.randn(2 * n + n * n, n * d), torch.tensor([0.4, 0.6, 0.8]), torch.randn(2 * n + n * n)


@pytest.mark.parametrize("used", [slice(None), 0, 1, 2, 3])
def test_the_way_into_a_block_equals_the_reference_whatever_is_used_of_it(used):
    def run(backend, *leaves):
        outputs = enter(*leaves, 20, 1e-6, 1e-6, backend=backend)
        return outputs if isinstance(used, slice) else outputs[used : used + 1]

    assert_alike(run, (torch.randn(2, 700, 4, 16), *weights()), 1e-3)


def test_ways_in_and_out_of_blocks_equal_the_reference():
    """Two in a row, as in a layer."""

    def run(backend, streams, output, *weights):
        for _ in range(2):
            x, post, comb, entered = enter(streams, *weights, 20, 1e-6, 1e-6, backend=backend)
            streams = expand(entered, comb, post, x.sin() + output, backend=backend)
        return streams, x

    assert_alike(run, (torch.randn(2, 70, 4, 16), torch.randn(2, 70, 16), *weights()), 1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_that_come_in_are_left_as_they_are(backend):
    """Others may hold them. Both with and without a gradient for what the block gets."""
    streams, *of_enter = torch.randn(2, 7, 4, 16), *weights()
    x, post, _, entered = enter(streams.requires_grad_(), *of_enter, 20, 1e-6, 1e-6, backend=backend)
    for other in (x, post):
        given = torch.randn_like(streams)
        kept = given.clone()
        torch.autograd.backward([other, entered], [torch.ones_like(other), given], retain_graph=True)
        assert torch.equal(given, kept)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
@pytest.mark.parametrize("iterations", [1, 2, 20])
def test_sinkhorn_saves_nothing_but_its_logits(iterations, backend):
    saved = []
    streams, *of_enter = torch.randn(1, 1100, 4, 16), *weights()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        outputs = enter(streams.requires_grad_(), *of_enter, iterations, 1e-6, 1e-6, backend=backend)
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
def test_recomputed_streams_are_not_saved_and_give_the_same_gradients(narrow):
    """Two halves of a layer, the streams between them kept or not."""
    inputs = (torch.randn(2, 70, 4, 16), torch.randn(2, 70, 16), *weights())
    found = []
    for again in (False, True):
        leaves = [t.clone().requires_grad_() for t in inputs]
        streams, output, *of_enter = leaves
        output = output.bfloat16() if narrow else output
        x, post, comb, entered = enter(streams, *of_enter, 20, 1e-6, 1e-6)
        between = expand(entered, comb, post, x.sin().to(output.dtype) + output)
        between_lives = StorageWeakRef(between.untyped_storage())
        recomputed = RecomputedStreams(between, entered, comb, post, x.detach().sin().to(output.dtype) + output)
        with recomputed.not_saved() if again else contextlib.nullcontext():
            x, post, comb, entered = enter(between, *of_enter, 20, 1e-6, 1e-6)
            streams = expand(entered, comb, post, x.cos())
        del between, entered
        assert between_lives.expired() == again
        loss = (streams * streams.detach().sign()).sum() + x.sum()
        with torch.autocast("cpu", torch.bfloat16):  # whose types are not those of the forward pass
            loss.backward()
        found.append([streams, *(leaf.grad for leaf in leaves)])
    assert all(map(torch.equal, *found))


def test_a_pass_without_a_backward_one_is_let_go():
    streams, *of_enter = torch.randn(2, 7, 4, 16), *(w.requires_grad_() for w in weights())
    x, post, comb, entered = enter(streams, *of_enter, 20, 1e-6, 1e-6)
    between = expand(entered, comb, post, x)
    with RecomputedStreams(between, entered, comb, post, x).not_saved():
        outputs = enter(between, *of_enter, 20, 1e-6, 1e-6)
        outputs = (*outputs, expand(outputs[3], outputs[2], outputs[1], outputs[0].cos()))
    lives = [StorageWeakRef(t.untyped_storage()) for t in (x, comb, between, *outputs)]
    del x, post, comb, entered, between, outputs
    assert all(each.expired() for each in lives)
