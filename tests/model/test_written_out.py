"""Backward passes that are written out, beside what autograd records for the same formula."""

import pytest
import torch
import torch.nn.functional as F

from model.linear import linear
from model.moe import swiglu
from model.norm import rms_normalize
from model.rope import RotaryFrequencies


def gradient(function, *inputs):
    """The output, and what a fixed gradient of it gives every input."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    out.backward(upstream.to(out.dtype))
    return out.detach(), *(leaf.grad for leaf in leaves)


def test_normalising():
    def as_written(x, weight=None):
        wide = x.float()
        out = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-3)
        return out if weight is None else out * weight

    x, weight = torch.randn(3, 5, 16), torch.randn(16)
    for inputs in ((x,), (x, weight), (x.bfloat16(), weight)):
        found = gradient(lambda x, *weight: rms_normalize(x, 1e-3, *weight), *inputs)
        torch.testing.assert_close(found, gradient(as_written, *inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu(dtype):
    def as_written(gate, up, gain=None):
        out = F.silu(gate.float().clamp(max=1.5)) * up.float().clamp(-1.5, 1.5)
        return (out if gain is None else out * gain).to(gate.dtype)

    gate, up, gain = 2 * torch.randn(3, 7, 16), 2 * torch.randn(3, 7, 16), torch.rand(3, 7, 1)
    gate[0, 0, 0], up[0, 0, :2] = 1.5, torch.tensor([1.5, -1.5])  # at the limit a gradient passes
    for inputs in ((gate.to(dtype), up.to(dtype)), (gate.to(dtype), up.to(dtype), gain)):
        found = gradient(lambda gate, up, *gain: swiglu(gate, up, 1.5, *gain), *inputs)
        tolerance = {} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
        torch.testing.assert_close(found, gradient(as_written, *inputs), **tolerance)


def test_products_of_groups():
    x, weight = torch.randn(2, 5, 3, 8), torch.randn(3, 6, 8)
    expected = gradient(lambda x, weight: torch.einsum("bsgi,goi->bsgo", x, weight), x, weight)
    torch.testing.assert_close(gradient(linear, x, weight), expected)


def test_rotating_some_dims_and_all():
    rotation = RotaryFrequencies(8, 100.0).at(torch.arange(5).unsqueeze(0))
    angle = torch.complex(*rotation).unsqueeze(2)

    def by_complex_numbers(x, angle):
        pairs = torch.view_as_complex(x[..., -8:].unflatten(-1, (4, 2)))
        return torch.cat((x[..., :-8], torch.view_as_real(pairs * angle).flatten(-2)), dim=-1)

    for dims in (8, 12):
        x = torch.randn(2, 5, 3, dims)
        for inverse, turn in ((False, angle), (True, angle.conj())):
            expected = gradient(lambda x, turn=turn: by_complex_numbers(x, turn), x)
            found = gradient(lambda x, inverse=inverse: rotation.apply(x, inverse), x)
            torch.testing.assert_close(found, expected)
    out, back = gradient(rotation.apply, torch.randn(2, 5, 3, 12, dtype=torch.bfloat16))
    assert out.dtype == torch.float32 and back.dtype == torch.bfloat16
