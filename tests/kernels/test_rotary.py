import pytest
import torch
from backend_testing import available, needs_native, output_and_gradients

from kernels.rotary import BACKENDS, angles, rotate, rotate_halves


@pytest.mark.parametrize("backend", available(BACKENDS))
def test_pairs_are_rotated_and_other_dims_pass_through(backend):
    angle = torch.rand(1, 5, 4) * 6
    cos, sin = angle.cos(), angle.sin()

    def pair_by_pair(x):
        before, rotated = x[..., :-8], []
        for k in range(4):
            a, b = x[..., -8 + 2 * k], x[..., -7 + 2 * k]
            c, s = cos[..., k, None], sin[..., k, None]
            rotated += [a * c - b * s, a * s + b * c]
        return torch.cat((before, torch.stack(rotated, -1)), -1)

    for dims in (8, 12, 13):
        x = torch.randn(2, 5, 3, dims)
        found = output_and_gradients(lambda x: rotate(x, cos, sin, backend=backend), x)
        torch.testing.assert_close(found, output_and_gradients(pair_by_pair, x))
        restored = output_and_gradients(lambda x: rotate(x, cos, sin, inverse=True, backend=backend), found[0])
        torch.testing.assert_close(restored[0], x)
        expected = output_and_gradients(lambda x: rotate(x, cos, sin, inverse=True, backend="reference"), found[0])
        torch.testing.assert_close(restored, expected)
    x = torch.randn(2, 5, 3, 12).bfloat16()
    out, grad = output_and_gradients(lambda x: rotate(x, cos, sin, backend=backend), x)
    assert out.dtype == torch.float32 and grad.dtype == torch.bfloat16
    torch.testing.assert_close(out, pair_by_pair(x.float()))


def test_pairs_of_two_halves_are_the_first_dims():
    angle = torch.rand(1, 5, 4) * 6
    cos, sin = angle.cos(), angle.sin()
    order = torch.tensor([8, 9, 10, 0, 4, 1, 5, 2, 6, 3, 7])  # the same pairs, neighbors in the last dims
    x = torch.randn(2, 5, 3, 11)
    expected = rotate(x[..., order], cos, sin, backend="reference")
    torch.testing.assert_close(rotate_halves(x, cos, sin)[..., order], expected)


@needs_native
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("shape", [(2, 5, 12), (1, 3, 4, 8), (2, 1, 3, 20)])
@torch.no_grad()
def test_cpu_equals_the_reference(shape, inverse):
    positions = torch.randint(0, 1 << 20, shape[:2])
    frequencies = 10_000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    found, expected = (angles(positions, frequencies, backend=b) for b in ("cpu", "reference"))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)
    for some in (positions, positions[:1]):
        cos, sin = angles(some, frequencies)
        x = torch.randn(shape)
        found, expected = (rotate(x, cos, sin, inverse, backend=b) for b in ("cpu", "reference"))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
