"""Run by test_interpreted.py with TRITON_INTERPRET=1."""

import pytest
import torch
import torch.nn.functional as F

from kernels.gated_delta_rule import gated_delta_rule


def inputs(batch, tokens, heads, key_dim, value_dim, strength=1.0):
    """Return q, k, v, g, beta and a state. Tokens of q, k and v are parts of longer rows, as in the mixer."""
    rows = torch.randn(batch, tokens, heads * (2 * key_dim + value_dim))
    q, k, v = rows.split((heads * key_dim, heads * key_dim, heads * value_dim), dim=-1)
    q, k, v = (x.unflatten(-1, (heads, -1)) for x in (q, k, v))
    return (
        q,
        F.normalize(k, dim=-1),
        v,
        -torch.rand(batch, tokens, heads, key_dim) * strength,
        torch.rand(batch, tokens, heads),
        torch.randn(batch, heads, key_dim, value_dim),
    )


def run(backend, given, positions=None):
    """Return the outputs, the last state and the gradients of all inputs."""
    leaves = [x.detach().requires_grad_() for x in given]
    outputs = gated_delta_rule(*leaves, positions=positions, backend=backend)
    generator = torch.Generator().manual_seed(1)
    torch.autograd.backward(outputs, [torch.randn(x.shape, generator=generator).to(x.dtype) for x in outputs])
    return [*(x.detach() for x in outputs), *(leaf.grad for leaf in leaves)]


def compare(given, positions=None):
    """Compare with the reference in float64, and return our results."""
    found = run("triton", given, positions)
    expected = run("reference", [x.double() for x in given], positions)
    for ours, exact in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-5 * max(1.0, exact.abs().max().item()))
    return found


@pytest.mark.parametrize("given_state", [True, False])
@pytest.mark.parametrize("shape", [(2, 1, 1, 1, 1), (1, 37, 2, 5, 19), (1, 16, 3, 17, 3)])
def test_rules_equal_the_reference_forward_and_backward(shape, given_state):
    compare(inputs(*shape)[: 6 if given_state else 5])


def test_documents_begin_with_an_empty_state():
    """Documents of one token, over a chunk's border, over a whole chunk, and one that began before the row."""
    rows = [3, 1, 1, 2, 12, 17, 6], [40, 2]
    positions = torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in rows])
    positions[1, :40] += 5
    compare(inputs(2, 42, 1, 3, 5), positions)


def test_decays_of_any_strength_stay_finite_and_exact():
    q, k, v, g, *others = inputs(1, 40, 2, 3, 2)
    g = g * 10.0 ** torch.randint(-6, 5, g.shape)
    g[0, 7, 0, 1] = g[0, 20] = float("-inf")
    *_, grad_g, _, _ = compare((q, k, v, g, *others))
    assert not grad_g[g == float("-inf")].any()


def test_unsupported_inputs_are_refused_with_the_supported_set():
    with pytest.raises(ValueError, match=r"supports dtypes float32; found float64$"):
        gated_delta_rule(*(x.double() for x in inputs(1, 2, 1, 2, 2)), backend="triton")
    with pytest.raises(ValueError, match=r"supports key dims up to 128; found 129$"):
        gated_delta_rule(*inputs(1, 2, 1, 129, 2), backend="triton")
