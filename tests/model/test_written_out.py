"""Backward passes that are written out, beside what autograd records for the same formula."""

import torch

from model.norm import rms_normalize
from model.rope import RotaryFrequencies


def gradient(function, x, upstream):
    leaf = x.clone().requires_grad_()
    out = function(leaf)
    out.backward(upstream)
    return out.detach(), leaf.grad


def test_normalising():
    x, upstream = torch.randn(3, 5, 16), torch.randn(3, 5, 16)
    expected = gradient(lambda x: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-3), x, upstream)
    torch.testing.assert_close(gradient(lambda x: rms_normalize(x, 1e-3), x, upstream), expected)


def test_rotating_some_dims_and_all():
    rotation = RotaryFrequencies(8, 100.0).at(torch.arange(5).unsqueeze(0))
    angle = torch.complex(*rotation).unsqueeze(2)

    def by_complex_numbers(x, angle):
        pairs = torch.view_as_complex(x[..., -8:].unflatten(-1, (4, 2)))
        return torch.cat((x[..., :-8], torch.view_as_real(pairs * angle).flatten(-2)), dim=-1)

    for dims in (8, 12):
        x, upstream = torch.randn(2, 5, 3, dims), torch.randn(2, 5, 3, dims)
        for inverse, turn in ((False, angle), (True, angle.conj())):
            expected = gradient(lambda x, turn=turn: by_complex_numbers(x, turn), x, upstream)
            found = gradient(lambda x, inverse=inverse: rotation.apply(x, inverse), x, upstream)
            torch.testing.assert_close(found, expected)
    narrow = torch.randn(2, 5, 3, 12, dtype=torch.bfloat16)
    out, back = gradient(rotation.apply, narrow, torch.ones(2, 5, 3, 12))
    assert out.dtype == torch.float32 and back.dtype == torch.bfloat16
