"""The state-space scan: backends against the definition, in chunks, documents and pieces, forward and backward."""

import pytest
import torch
from backend_testing import available, needs_native, outputs_and_gradients, positions_of, random_positions

from kernels.ssd_scan import BACKENDS, backend_for, eager, scan_in_fixed_order, ssd_scan

SHAPES = [(1, 1, 1, 1, 1, 1), (2, 5, 2, 3, 1, 4), (2, 19, 6, 5, 3, 7), (1, 33, 4, 16, 4, 9), (3, 64, 3, 2, 1, 17)]
"""Batch, tokens, heads, head dim, groups, state size."""
CHUNKS = [1, 3, 16, 64]


def inputs(batch, tokens, heads, head_dim, groups, state_size, dtype=torch.float32):
    """Return x, dt, A, B, C, D and a state."""

    def normal(*shape):
        return torch.randn(shape, dtype=dtype)

    return (
        normal(batch, tokens, heads, head_dim),
        torch.rand(batch, tokens, heads, dtype=dtype),
        -0.1 - torch.rand(heads, dtype=dtype),
        normal(batch, tokens, groups, state_size),
        normal(batch, tokens, groups, state_size),
        normal(heads),
        normal(batch, heads, head_dim, state_size),
    )


def test_the_reference_is_a_product_with_a_semiseparable_matrix():
    batch, tokens, heads, _, groups, _ = shape = (2, 6, 4, 3, 2, 5)
    x, dt, A, B, C, D, _ = inputs(*shape, dtype=torch.float64)
    found, state = ssd_scan(x, dt, A, B, C, D, backend="reference")
    for b in range(batch):
        for h in range(heads):
            group = h // (heads // groups)
            rates = dt[b, :, h] * A[h]
            matrix = torch.zeros(tokens, tokens, dtype=torch.float64)
            for i in range(tokens):
                for j in range(i + 1):
                    weight = C[b, i, group] @ B[b, j, group] * dt[b, j, h]
                    matrix[i, j] = weight * rates[j + 1 : i + 1].sum().exp()
            torch.testing.assert_close(found[b, :, h], matrix @ x[b, :, h] + D[h] * x[b, :, h])
            fade = torch.stack([rates[j + 1 :].sum().exp() for j in range(tokens)]) * dt[b, :, h]
            torch.testing.assert_close(state[b, h], (x[b, :, h] * fade.unsqueeze(-1)).T @ B[b, :, group])


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_eager_equals_the_reference(shape, chunk, documents):
    tensors = inputs(*shape)
    positions = random_positions(shape) if documents else None
    for given in (tensors, tensors[:-1]):  # with and without an initial state
        found = outputs_and_gradients(ssd_scan, given, positions=positions, chunk_size=chunk, backend="eager")
        expected = outputs_and_gradients(ssd_scan, given, positions=positions, backend="reference")
        for ours, theirs in zip(found, expected):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * max(1.0, theirs.abs().max().item()))


def test_eager_computes_long_inputs_in_pieces(monkeypatch):
    tensors, positions = inputs(*SHAPES[2]), random_positions(SHAPES[2])
    expected = outputs_and_gradients(ssd_scan, tensors, positions=positions, chunk_size=4, backend="eager")
    monkeypatch.setattr(eager, "_MAX_WEIGHTS", 2 * 2 * 6 * 4 * 4)  # two chunks at once
    calls, scan = [], eager._scan_chunks
    monkeypatch.setattr(eager, "_scan_chunks", lambda *a: calls.append(a[0].shape[1]) or scan(*a))
    found = outputs_and_gradients(ssd_scan, tensors, positions=positions, chunk_size=4, backend="eager")
    assert calls == [8, 8, 3]
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", available(BACKENDS))
@torch.no_grad()
def test_documents_do_not_reach_one_another(backend):
    lengths = [1, 6, 2, 11, 1, 3]
    *tensors, _ = inputs(2, sum(lengths), 4, 3, 2, 5)
    x, dt, A, B, C, D = tensors
    packed, last = ssd_scan(*tensors, positions=positions_of(lengths, 2), chunk_size=4, backend=backend)
    parts = [z.split(lengths, dim=1) for z in (x, dt, B, C)]
    alone = [ssd_scan(x, dt, A, B, C, D, chunk_size=4, backend=backend) for x, dt, B, C in zip(*parts)]
    torch.testing.assert_close(packed, torch.cat([y for y, _ in alone], dim=1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(last, alone[-1][1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", available(BACKENDS))
@torch.no_grad()
def test_pieces_continue_from_the_state(backend):
    x, dt, A, B, C, D, state = inputs(2, 40, 4, 3, 2, 5)
    expected, last = ssd_scan(x, dt, A, B, C, D, state, chunk_size=16, backend=backend)
    outputs, pieces = [], [z.split([1, 16, 2, 20, 1], dim=1) for z in (x, dt, B, C)]
    for x, dt, B, C in zip(*pieces):
        y, state = ssd_scan(x, dt, A, B, C, D, state, chunk_size=16, backend=backend)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, dim=1), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_the_gradient_is_the_functions(backend):
    shape = (2, 5, 2, 2, 1, 3)
    tensors = [x.requires_grad_() for x in inputs(*shape, dtype=torch.float64)]
    for positions in (None, random_positions(shape)):

        def scan(*t, positions=positions):
            return ssd_scan(*t, positions=positions, chunk_size=2, backend=backend)

        assert torch.autograd.gradcheck(scan, tensors)


def test_steps_of_any_size_stay_finite_and_exact():
    x, _, A, B, C, D, state = inputs(2, 24, 3, 2, 1, 5)
    dt = 10.0 ** torch.randint(-6, 5, (2, 24, 3))
    tensors = (x, dt.float(), A, B, C, D, state)
    found = outputs_and_gradients(ssd_scan, tensors, chunk_size=8, backend="eager")
    wide = outputs_and_gradients(ssd_scan, [z.double() for z in tensors], backend="reference")
    for ours, expected in zip(found, wide):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


def test_products_stay_in_float32_under_autocast():
    tensors = inputs(2, 20, 4, 8, 1, 16)
    expected = ssd_scan(*tensors, chunk_size=8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ssd_scan(*tensors, chunk_size=8)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected))


@needs_native
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_cpu_equals_the_reference(shape, documents):
    tensors = inputs(*shape)
    positions = random_positions(shape) if documents else None
    for given in (tensors, tensors[:-1]):
        before = [x.clone() for x in given]
        found, expected = (ssd_scan(*given, positions=positions, backend=backend) for backend in ("cpu", "reference"))
        for ours, theirs in zip(found, expected):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        assert all(map(torch.equal, given, before))


@needs_native
@torch.no_grad()
def test_cpu_refuses_shapes_that_do_not_match():
    x, dt, A, B, C, D, state = inputs(*SHAPES[1])
    assert backend_for(x) == "cpu" and backend_for(x.double()) == "eager"
    with pytest.raises(ValueError, match="do not match"):
        ssd_scan(x, dt, A, B[:, 1:], C, D, backend="cpu")
    with pytest.raises(ValueError, match="expected a state"):
        ssd_scan(x, dt, A, B, C, D, state[:1], backend="cpu")
    with pytest.raises(ValueError, match="expected positions"):
        ssd_scan(x, dt, A, B, C, D, positions=torch.zeros(2, 4, dtype=torch.int64), backend="cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_bits_in_fixed_order_do_not_depend_on_the_batch_or_pieces(dtype):
    x, dt, A, B, C, D, state = inputs(3, 18, 6, 5, 2, 7)
    decay, state = (dt * A).exp(), state.to(dtype).float()
    expected, last = scan_in_fixed_order(x, dt, decay, B, C, D, state, dtype)
    reference, _ = ssd_scan(x, dt, A, B, C, D, state, backend="reference")
    bound = 1e-5 if dtype == torch.float32 else 0.2
    torch.testing.assert_close(expected, reference, rtol=bound, atol=bound)
    outputs, state, pieces = [], state[1:2], [z[1:2].split([1, 6, 11], dim=1) for z in (x, dt, decay, B, C)]
    for x, dt, decay, B, C in zip(*pieces):
        y, state = scan_in_fixed_order(x, dt, decay, B, C, D, state, dtype)
        outputs.append(y)
    assert torch.equal(torch.cat(outputs, dim=1), expected[1:2]) and torch.equal(state, last[1:2])
    assert torch.equal(state.to(dtype).float(), state)


@torch.no_grad()
def test_outputs_in_fixed_order_read_the_state_before_it_is_rounded():
    x, dt, A, B, C, D, _ = tensors = inputs(2, 1, 4, 3, 2, 5)
    state = tensors[-1].bfloat16().float()
    found, last = scan_in_fixed_order(x, dt, (dt * A).exp(), B, C, D, state, torch.bfloat16)
    expected, exact = ssd_scan(x, dt, A, B, C, D, state, backend="reference")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(last, exact.bfloat16().float(), rtol=2**-7, atol=1e-6)
