import pytest
import torch
from backend_testing import needs_native

from kernels.cache_io import EntryLayout, pack, unpack
from kernels.fused_experts import MAX_TOKENS, fused_experts, prefers_fused


@needs_native
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("inner", "width"), [(8, 12), (5, 7), (33, 32)])
@torch.no_grad()
def test_cpu_equals_the_reference(inner, width, stored):
    w1, w3, w2 = (torch.randn(s).to(stored) for s in ((4, inner, width), (4, inner, width), (4, width, inner)))
    x, chosen, weights = torch.randn(5, width), torch.randint(0, 4, (5, 2)), torch.rand(5, 2)
    stacks = w1, w3, w2
    for shared in ((), tuple(w[0].clone() for w in stacks)):
        found, expected = (
            fused_experts(x, chosen, weights, stacks, shared, 10.0, backend=b) for b in ("cpu", "reference")
        )
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(IndexError, match="expert 4 of 4"):
        fused_experts(x, torch.full((5, 2), 4), weights, stacks, (), 10.0, backend="cpu")


def packed(*shape):
    return pack(torch.randn(shape) * shape[-1] ** -0.5, EntryLayout(shape[-1], "fp4"))


def packed_case(tokens, d, inner, experts=4, k=3):
    """Return x, chosen experts with repetitions, their weights, packed stacks, and a packed shared expert."""
    stacks = packed(experts, inner, d), packed(experts, inner, d), packed(experts, d, inner)
    shared = packed(2 * inner, d), packed(2 * inner, d), packed(d, 2 * inner)
    chosen = torch.randint(0, experts, (tokens, k))
    chosen[0] = chosen[0, 0]  # one expert several times for one token
    return torch.randn(tokens, d), chosen, torch.rand(tokens, k), stacks, shared


@needs_native
@pytest.mark.parametrize("tokens", [1, 3, 8, 21])
@pytest.mark.parametrize(("d", "inner"), [(32, 96), (96, 32), (96, 96), (32, 32)])
@torch.no_grad()
def test_cpu_equals_the_reference_on_packed_experts(tokens, d, inner):
    x, chosen, weights, stacks, shared = packed_case(tokens, d, inner)
    for some in ((), shared, tuple(unpack(w, EntryLayout(n, "fp4")) for w, n in zip(shared, (d, d, 2 * inner)))):
        found, expected = (
            fused_experts(x, chosen, weights, stacks, some, 10.0, backend=b) for b in ("cpu", "reference")
        )
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_reference_unpacks_experts():
    x, chosen, weights, stacks, shared = packed_case(3, 96, 32)
    floats = [
        tuple(unpack(w, EntryLayout(n, "fp4")) for w, n in zip(matrices, (96, 96, inner)))
        for matrices, inner in ((stacks, 32), (shared, 64))
    ]
    expected = fused_experts(x, chosen, weights, *floats, 10.0, backend="reference")
    assert torch.equal(fused_experts(x, chosen, weights, stacks, shared, 10.0, backend="reference"), expected)


@needs_native
@torch.no_grad()
def test_cpu_refuses_packed_experts_that_do_not_match():
    x, chosen, weights, stacks, shared = packed_case(3, 96, 32)
    w1, w3, w2 = stacks
    misfits = {
        "w1 of other inputs": (packed(4, 32, 64), packed(4, 32, 64), w2),
        "w3 of another shape": (w1, packed(4, 64, 96), w2),
        "w2 of other inputs": (w1, w3, packed(4, 96, 64)),
        "w2 of other outputs": (w1, w3, packed(4, 64, 32)),
        "w2 of fewer experts": (w1, w3, w2[:3]),
        "one matrix is not packed": (w1, w3, torch.randn(4, 96, 32)),
        "not contiguous": (w1, w3, w2.transpose(0, 1).contiguous().transpose(0, 1)),
    }
    for name, misfit in misfits.items():
        with pytest.raises(ValueError, match="do not match"):
            fused_experts(x, chosen, weights, misfit, (), 10.0, backend="cpu")
            pytest.fail(f"accepted: {name}")
    for wrong in ((packed(64, 64), packed(64, 64), packed(96, 64)), shared[:2]):
        with pytest.raises(ValueError, match="do not match"):
            fused_experts(x, chosen, weights, stacks, wrong, 10.0, backend="cpu")
    with pytest.raises(ValueError, match="do not match"):  # 48 is not a multiple of 32
        fused_experts(*packed_case(3, 48, 32)[:4], (), 10.0, backend="cpu")
    with pytest.raises(ValueError, match="do not match"):  # one choice too few
        fused_experts(x, chosen[:2], weights, stacks, (), 10.0, backend="cpu")
    with pytest.raises(IndexError, match="expert 4 of 4"):
        fused_experts(x, torch.full((3, 3), 4), weights, stacks, (), 10.0, backend="cpu")


@needs_native
def test_few_tokens_without_gradients_prefer_the_fused_operator():
    w1 = torch.randn(4, 32, 96)
    with torch.no_grad():
        assert prefers_fused(torch.randn(MAX_TOKENS, 96), w1)
        assert not prefers_fused(torch.randn(MAX_TOKENS + 1, 96), w1)
    assert not prefers_fused(torch.randn(1, 96), w1)
