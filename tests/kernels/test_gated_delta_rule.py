"""The gated delta rule: backends against the definition, in chunks, documents and pieces, forward and backward."""

import pytest
import torch
import torch.nn.functional as F
from backend_testing import available, needs_native, outputs_and_gradients, positions_of, random_positions

from kernels.gated_delta_rule import BACKENDS, backend_for, eager, gated_delta_rule, scan_in_fixed_order
from kernels.gated_delta_rule.decayed_products import decayed_products

SHAPES = [(1, 1, 1, 1, 1), (2, 5, 2, 3, 4), (2, 19, 3, 7, 5), (1, 33, 2, 16, 9), (3, 64, 1, 8, 17)]
"""Batch, tokens, heads, key dim, value dim."""
CHUNKS = [1, 2, 16, 64]


def inputs(batch, tokens, heads, key_dim, value_dim, dtype=torch.float32, strongest=1.0):
    """Return q, k, v, g, beta and a state. Decay rates lie between 1e-4 and ``strongest``."""

    def normal(*shape):
        return torch.randn(shape, dtype=dtype)

    rates = torch.empty(batch, tokens, heads, key_dim, dtype=dtype).uniform_(-4, 0)
    return (
        normal(batch, tokens, heads, key_dim),
        F.normalize(normal(batch, tokens, heads, key_dim), dim=-1),
        normal(batch, tokens, heads, value_dim),
        -strongest * 10**rates,
        torch.rand(batch, tokens, heads, dtype=dtype),
        normal(batch, heads, key_dim, value_dim),
    )


def assert_equal(found, expected, tolerance=1e-4):
    for ours, theirs in zip(found, expected, strict=True):
        bound = tolerance * max(1.0, theirs.abs().max().item())
        torch.testing.assert_close(ours.to(theirs.dtype), theirs, rtol=tolerance, atol=bound)


def test_the_reference_is_the_reports_equation():
    shape = (2, 6, 2, 4, 3)
    q, k, v, g, beta, state = inputs(*shape, dtype=torch.float64)
    found, last = gated_delta_rule(q, k, v, g, beta, state, backend="reference")
    for b in range(2):
        for h in range(2):
            S = state[b, h]
            for t in range(6):
                key = k[b, t, h]
                keep = torch.eye(4, dtype=torch.float64) - beta[b, t, h] * torch.outer(key, key)
                S = keep @ torch.diag(g[b, t, h].exp()) @ S + beta[b, t, h] * torch.outer(key, v[b, t, h])
                torch.testing.assert_close(found[b, t, h], S.T @ q[b, t, h])
            torch.testing.assert_close(last[b, h], S)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_eager_equals_the_reference(shape, chunk, documents):
    tensors = inputs(*shape)
    positions = random_positions(shape) if documents else None
    for given in (tensors, tensors[:-1]):  # with and without an initial state
        found = outputs_and_gradients(gated_delta_rule, given, positions=positions, chunk_size=chunk, backend="eager")
        assert_equal(found, outputs_and_gradients(gated_delta_rule, given, positions=positions, backend="reference"))


def test_eager_computes_long_inputs_in_pieces(monkeypatch):
    shape = SHAPES[2]
    tensors, positions = inputs(*shape), random_positions(shape)
    expected = outputs_and_gradients(gated_delta_rule, tensors, positions=positions, chunk_size=4, backend="eager")
    monkeypatch.setattr(eager, "_MAX_ELEMENTS", 2 * 2 * 3 * 4 * 7)  # two chunks at once
    calls, scan = [], eager._scan_chunks
    monkeypatch.setattr(eager, "_scan_chunks", lambda *a: calls.append(a[0][0].shape[1]) or scan(*a))
    assert_equal(
        outputs_and_gradients(gated_delta_rule, tensors, positions=positions, chunk_size=4, backend="eager"), expected
    )
    assert calls == [8, 8, 3]


@pytest.mark.parametrize("backend", available(BACKENDS))
@torch.no_grad()
def test_documents_do_not_reach_one_another(backend):
    lengths = [1, 6, 2, 11, 1, 3]
    *tensors, _ = inputs(2, sum(lengths), 2, 5, 3)
    packed, last = gated_delta_rule(*tensors, positions=positions_of(lengths, 2), chunk_size=4, backend=backend)
    parts = [z.split(lengths, dim=1) for z in tensors]
    alone = [gated_delta_rule(*pieces, chunk_size=4, backend=backend) for pieces in zip(*parts)]
    torch.testing.assert_close(packed, torch.cat([out for out, _ in alone], dim=1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(last, alone[-1][1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", available(BACKENDS))
@torch.no_grad()
def test_large_values_of_a_document_do_not_reach_the_next(backend):
    """Even infinitely large values of one document leave the next one alone."""
    lengths = [5, 6]
    q, k, v, g, beta, _ = inputs(1, 11, 2, 5, 3)
    loud = torch.cat((v[:, :5] * 1e30, v[:, 5:]), dim=1)
    options = {"positions": positions_of(lengths), "chunk_size": 8, "backend": backend}
    found, expected = (gated_delta_rule(q, k, values, g, beta, **options) for values in (loud, v))
    assert torch.equal(found[0][:, 5:], expected[0][:, 5:]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("backend", available(BACKENDS))
@torch.no_grad()
def test_pieces_continue_from_the_state(backend):
    *tensors, state = inputs(2, 40, 2, 5, 3)
    expected, last = gated_delta_rule(*tensors, state, chunk_size=16, backend=backend)
    outputs = []
    for pieces in zip(*(z.split([1, 16, 2, 20, 1], dim=1) for z in tensors)):
        out, state = gated_delta_rule(*pieces, state, chunk_size=16, backend=backend)
        outputs.append(out)
    torch.testing.assert_close(torch.cat(outputs, dim=1), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_the_gradient_is_the_functions(backend):
    shape = (2, 5, 2, 3, 2)
    tensors = [x.requires_grad_() for x in inputs(*shape, dtype=torch.float64)]
    for positions in (None, random_positions(shape)):

        def scan(*t, positions=positions):
            return gated_delta_rule(*t, positions=positions, chunk_size=4, backend=backend)

        assert torch.autograd.gradcheck(scan, tensors)


def test_the_gradient_of_the_decayed_products_is_the_functions():
    q, k, _, g, beta, _ = (x.double() for x in inputs(3, 8, 1, 2, 1))
    tensors = [x.squeeze(2).requires_grad_() for x in (q, k * beta.unsqueeze(-1), k, g)]
    assert torch.autograd.gradcheck(decayed_products, tensors)


@pytest.mark.parametrize("strongest", [100.0, 1e4, 1e30])
def test_decays_of_any_strength_stay_finite_and_exact(strongest):
    shape = (2, 50, 2, 6, 5)
    tensors = list(inputs(*shape))
    mixed = 10 ** torch.empty(shape[:4]).uniform_(-6, 1)
    tensors[3] = -torch.where(torch.rand(shape[:4]) < 0.3, strongest * torch.rand(shape[:4]), mixed)
    found = outputs_and_gradients(gated_delta_rule, tensors, chunk_size=32, backend="eager")
    wide = outputs_and_gradients(gated_delta_rule, [z.double() for z in tensors], backend="reference")
    assert_equal(found, wide)


def test_no_decay_and_a_full_decay_are_exact():
    """g = 0 is the plain delta rule; with g = -inf only the token itself is left."""
    q, k, v, g, beta, state = inputs(2, 20, 2, 6, 5, dtype=torch.float64)
    found, _ = gated_delta_rule(q, k, v, torch.full_like(g, -torch.inf), beta, state, chunk_size=8, backend="eager")
    torch.testing.assert_close(found, beta.unsqueeze(-1) * v * (q * k).sum(-1, keepdim=True))
    plain = [(q, k, v, torch.zeros_like(g), beta, state)]
    (a, s), (b, z) = (gated_delta_rule(*plain[0], chunk_size=8, backend=name) for name in ("eager", "reference"))
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(s, z)


def test_repeated_keys_are_replaced():
    """With beta = 1 and no decay a second value under a key replaces the first one."""
    key = F.normalize(torch.randn(1, 1, 1, 8), dim=-1).expand(1, 40, 1, 8)
    v = torch.randn(1, 40, 1, 3)
    for backend in ("eager", "reference"):
        out, _ = gated_delta_rule(key, key, v, torch.zeros_like(key), torch.ones(1, 40, 1), backend=backend)
        torch.testing.assert_close(out, v, rtol=1e-4, atol=1e-5)


def test_products_stay_in_float32_under_autocast():
    tensors = inputs(2, 20, 2, 8, 16)
    expected = outputs_and_gradients(gated_delta_rule, tensors, chunk_size=8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = outputs_and_gradients(gated_delta_rule, tensors, chunk_size=8)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found[:2], expected[:2]))
    assert_equal(found, expected, 0.05)


@needs_native
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_cpu_equals_the_reference(shape, documents):
    tensors = inputs(*shape, strongest=200.0)
    positions = random_positions(shape) if documents else None
    for given in (tensors, tensors[:-1]):
        before = [x.clone() for x in given]
        found, expected = (gated_delta_rule(*given, positions=positions, backend=name) for name in ("cpu", "reference"))
        for ours, theirs in zip(found, expected):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        assert all(map(torch.equal, given, before))


@needs_native
@torch.no_grad()
def test_the_native_scan_serves_every_length_without_gradients():
    q, *_ = inputs(1, 100, 1, 1, 1)
    assert backend_for(q) == "cpu" and backend_for(q.double()) == "eager"
    with torch.enable_grad():
        assert backend_for(q) == "eager"
    q, k, v, g, beta, state = inputs(*SHAPES[1])
    with pytest.raises(ValueError, match="do not match"):
        gated_delta_rule(q, k[:, 1:], v, g, beta, backend="cpu")
    with pytest.raises(ValueError, match="expected a state"):
        gated_delta_rule(q, k, v, g, beta, state[:1], backend="cpu")
    with pytest.raises(ValueError, match="expected positions"):
        gated_delta_rule(q, k, v, g, beta, positions=torch.zeros(2, 5), backend="cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_bits_in_fixed_order_do_not_depend_on_the_batch_or_pieces(dtype):
    q, k, v, g, beta, state = inputs(3, 18, 3, 5, 7)
    decay, state = g.exp(), state.to(dtype).float()
    expected, last = scan_in_fixed_order(q, k, v, decay, beta, state, dtype)
    reference, _ = gated_delta_rule(q, k, v, g, beta, state, backend="reference")
    bound = 1e-5 if dtype == torch.float32 else 0.2
    torch.testing.assert_close(expected, reference, rtol=bound, atol=bound)
    outputs, state = [], state[1:2]
    for pieces in zip(*(z[1:2].split([1, 6, 11], dim=1) for z in (q, k, v, decay, beta))):
        out, state = scan_in_fixed_order(*pieces, state, dtype)
        outputs.append(out)
    assert torch.equal(torch.cat(outputs, dim=1), expected[1:2]) and torch.equal(state, last[1:2])
    assert torch.equal(state.to(dtype).float(), state)
