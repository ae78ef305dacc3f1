"""Run by test_interpreted.py with TRITON_INTERPRET=1."""

import pytest
import torch

from kernels.ssd_scan import ssd_scan


def inputs(batch, tokens, heads, head_dim, groups, state_size):
    """Return x, dt, A, B, C, D and a state. Tokens of x, B and C are parts of longer rows, as in the mixer."""
    inner, group = heads * head_dim, groups * state_size
    rows = torch.randn(batch, tokens, inner + 2 * group)
    x, B, C = rows.split((inner, group, group), dim=-1)
    return (
        x.unflatten(-1, (heads, head_dim)),
        torch.rand(batch, tokens, heads),
        -0.1 - torch.rand(heads),
        B.unflatten(-1, (groups, state_size)),
        C.unflatten(-1, (groups, state_size)),
        torch.randn(heads),
        torch.randn(batch, heads, head_dim, state_size),
    )


def run(backend, given, positions=None):
    """Return y, the last state and the gradients of all inputs."""
    leaves = [x.detach().requires_grad_() for x in given]
    outputs = ssd_scan(*leaves, positions=positions, backend=backend)
    generator = torch.Generator().manual_seed(1)
    torch.autograd.backward(outputs, [torch.randn(x.shape, generator=generator).to(x.dtype) for x in outputs])
    return [*(x.detach() for x in outputs), *(leaf.grad for leaf in leaves)]


def compare(given, positions=None, rtol=1e-4):
    found = run("triton", given, positions)
    expected = run("reference", [x.double() for x in given], positions)
    for ours, exact in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), exact, rtol=rtol, atol=1e-5 * max(1.0, exact.abs().max().item()))


@pytest.mark.parametrize("given_state", [True, False])
@pytest.mark.parametrize("shape", [(2, 1, 1, 1, 1, 1), (1, 37, 4, 5, 2, 19), (2, 16, 3, 17, 1, 3)])
def test_scans_equal_the_reference_forward_and_backward(shape, given_state):
    compare(inputs(*shape)[: 7 if given_state else 6])


def test_documents_begin_with_an_empty_state():
    """Documents of one token, over a chunk's border, over a whole chunk, and one that began before the row."""
    rows = [3, 1, 1, 2, 12, 17, 6], [40, 2]
    positions = torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in rows])
    positions[1, :40] += 5
    compare(inputs(2, 42, 2, 3, 1, 5), positions)


def test_steps_of_any_size_stay_finite_and_exact():
    x, _, *others = inputs(1, 40, 3, 2, 1, 5)
    compare((x, 10.0 ** torch.randint(-6, 5, (1, 40, 3)), *others), rtol=1e-3)


def test_unsupported_inputs_are_refused_with_the_supported_set():
    with pytest.raises(ValueError, match=r"supports dtypes float32; found float64$"):
        ssd_scan(*(x.double() for x in inputs(1, 2, 1, 2, 1, 2)), backend="triton")
    with pytest.raises(ValueError, match=r"supports head dims up to 128; found 129$"):
        ssd_scan(*inputs(1, 2, 1, 129, 1, 2), backend="triton")
