"""Backward passes that are written out, beside what autograd records for the readable formula."""

import pytest
import torch
import torch.nn.functional as F

from kernels import rms_norm, rotary, swiglu
from kernels.expert_dispatch import by_expert, combine, dispatch


def gradient(function, *inputs):
    """The output, and what a fixed gradient of it gives every input."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    out.backward(upstream.to(out.dtype))
    return out.detach(), *(leaf.grad for leaf in leaves)


def test_they_run_where_gradients_are_recorded():
    chosen = [operation.backend_for(torch.zeros(1)) for operation in (rms_norm, rotary, swiglu)]
    assert chosen == ["written_out", "as_complex", "written_out"]


@pytest.mark.parametrize("shape", [(3, 5, 16), (16,), (0, 16)])
def test_normalising(shape):
    x, weight = torch.randn(shape), torch.randn(16)
    for inputs in ((x,), (x, weight), (x.bfloat16(), weight)):
        found, expected = (
            gradient(lambda x, *weight, b=backend: rms_norm.rms_normalize(x, 1e-3, *weight, backend=b), *inputs)
            for backend in ("written_out", "reference")
        )
        torch.testing.assert_close(found, expected)


def test_normalised_rows_have_a_mean_square_of_one():
    x, weight = 3 * torch.randn(4, 64), torch.randn(64)
    out = rms_norm.rms_normalize(x, 0.0)
    torch.testing.assert_close(out.square().mean(-1), torch.ones(4))
    torch.testing.assert_close(out / x, (out / x)[:, :1].expand(4, 64))
    torch.testing.assert_close(rms_norm.rms_normalize(x, 0.0, weight), out * weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu(dtype):
    gate, up, gain = 2 * torch.randn(3, 7, 16), 2 * torch.randn(3, 7, 16), torch.rand(3, 7, 1)
    gate[0, 0, 0], up[0, 0, :2] = 1.5, torch.tensor([1.5, -1.5])  # at the limit a gradient passes
    for inputs in ((gate.to(dtype), up.to(dtype)), (gate.to(dtype), up.to(dtype), gain)):
        found, expected = (
            gradient(lambda gate, up, *gain, b=b: swiglu.swiglu(gate, up, 1.5, *gain, backend=b), *inputs)
            for b in ("written_out", "reference")
        )
        tolerance = {} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
        torch.testing.assert_close(found, expected, **tolerance)


@pytest.mark.parametrize("backend", swiglu.BACKENDS)
def test_swiglu_clamps(backend):
    gate, up = torch.tensor([50.0, -50.0, 1.0]), torch.tensor([20.0, -20.0, 2.0])
    limited = swiglu.swiglu(gate, up, 10.0, backend=backend)
    torch.testing.assert_close(limited, F.silu(torch.tensor([10.0, -50.0, 1.0])) * torch.tensor([10.0, -10.0, 2.0]))


@pytest.mark.parametrize("backend", ["reference", "as_complex"])
def test_rotating_some_dims_and_all(backend):
    angles = torch.rand(1, 5, 4) * 6
    cos, sin = angles.cos(), angles.sin()

    def pair_by_pair(x):
        before, turned = x[..., :-8], []
        for k in range(4):
            a, b = x[..., -8 + 2 * k], x[..., -7 + 2 * k]
            c, s = cos[..., k, None], sin[..., k, None]
            turned += [a * c - b * s, a * s + b * c]
        return torch.cat((before, torch.stack(turned, -1)), -1)

    for dims in (8, 12):
        x = torch.randn(2, 5, 3, dims)
        found = gradient(lambda x: rotary.rotate(x, cos, sin, backend=backend), x)
        torch.testing.assert_close(found, gradient(pair_by_pair, x))
        torch.testing.assert_close(rotary.rotate(found[0], cos, sin, inverse=True, backend=backend), x)
    out, back = gradient(lambda x: rotary.rotate(x, cos, sin, backend=backend), torch.randn(2, 5, 3, 12).bfloat16())
    assert out.dtype == torch.float32 and back.dtype == torch.bfloat16


def test_rows_of_experts_are_filled_up_to_multiples():
    chosen = torch.tensor([[2, 0], [0, 2], [2, 3]])
    to = by_expert(chosen, 4)
    assert to.picks.tolist() == [1, 2, 0, 3, 4, 5] and to.counts == [2, 0, 3, 1]
    assert to.places.tolist() == [[2, 0], [1, 3], [4, 5]] and to.tokens.tolist() == [0, 1, 0, 1, 2, 2]
    to = by_expert(chosen, 4, 2)
    assert to.picks.tolist() == [1, 2, 0, 3, 4, -1, 5, -1] and to.counts == [2, 0, 4, 2]
    assert to.places.tolist() == [[2, 0], [1, 3], [4, 6]]


@pytest.mark.parametrize("tokens", [0, 9])
@pytest.mark.parametrize("narrow", [False, True])
def test_rows_go_to_experts_and_their_sums_come_back(tokens, narrow):
    chosen = torch.rand(tokens, 5).argsort(-1)[:, :2]
    dtype = torch.bfloat16 if narrow else torch.float32
    to = by_expert(chosen, 5, 4)
    gains = torch.randn(len(to.picks), 1).masked_fill(to.picks.unsqueeze(-1) < 0, 0)
    x = torch.randn(tokens, 8)

    def run(x, backend):
        rows = dispatch(x, to, dtype, backend)
        assert rows.dtype == dtype
        return combine(rows * gains.to(dtype), to, torch.float32, backend)

    found, expected = (gradient(lambda x, b=b: run(x, b), x) for b in ("written_out", "reference"))
    torch.testing.assert_close(found, expected, rtol=0.02 if narrow else 1e-5, atol=0.02 if narrow else 1e-5)
    for n in range(tokens):
        total = sum(x[n] * gains[row] for row in to.places[n].tolist())
        torch.testing.assert_close(found[0][n], total, rtol=0.02 if narrow else 1e-5, atol=0.02 if narrow else 1e-5)
