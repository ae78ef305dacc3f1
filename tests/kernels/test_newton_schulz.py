import pytest
import torch

from kernels.newton_schulz import V4_COEFFICIENTS, eager, newton_schulz
from kernels.newton_schulz.eager import prefers_gram


@pytest.mark.parametrize("shape", [(8, 8), (16, 64), (64, 16), (5, 24, 12)])
def test_singular_values_become_one_and_directions_stay(shape):
    torch.manual_seed(0)
    matrix = torch.randn(*shape)
    out = newton_schulz(matrix)
    values = torch.linalg.svdvals(out)
    assert values.min() > 0.7 and values.max() < 1.2
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    polar = u @ vh
    cosine = (out * polar).sum() / (out.norm() * polar.norm())
    assert cosine > 0.99


def test_a_batch_equals_its_matrices():
    batch = torch.randn(4, 12, 20)
    torch.testing.assert_close(
        newton_schulz(batch), torch.stack([newton_schulz(m) for m in batch]), rtol=1e-4, atol=1e-5
    )


def test_zero_stays_zero():
    assert newton_schulz(torch.zeros(6, 4)).abs().max() == 0


def ill_conditioned(rows, columns):
    """Return a matrix with singular values from 1 down to 1e-4."""
    left = torch.linalg.qr(torch.randn(rows, rows))[0]
    return left @ torch.diag(torch.logspace(0, -4, rows)) @ torch.linalg.qr(torch.randn(columns, rows))[0].T


SHAPES = [(32, 32), (32, 40), (32, 64), (32, 256), (256, 32), (3, 16, 64), (2, 3, 64, 16), (1, 100)]


@pytest.mark.parametrize("shape", SHAPES)
def test_eager_equals_the_reference(shape):
    matrices = torch.randn(shape)
    expected = newton_schulz(matrices, backend="reference")
    torch.testing.assert_close(newton_schulz(matrices), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(newton_schulz(matrices, dtype=torch.bfloat16), expected, rtol=0, atol=0.03)


@pytest.mark.parametrize("steps", [1, 2, 5, 6, 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_steps(steps, dtype):
    matrices, coefficients = torch.randn(2, 16, 96), V4_COEFFICIENTS[-steps:]
    expected = newton_schulz(matrices, coefficients, backend="reference")
    atol = 1e-5 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(newton_schulz(matrices, coefficients, dtype), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("shape", [(64, 64), (64, 256), (256, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matrices_of_low_rank_neither_overflow_nor_lose_directions(shape, dtype):
    """After too many steps a Gram matrix has negative eigenvalues, which the iteration drives to infinity."""
    low = torch.randn(shape[0], 4) @ torch.randn(4, shape[1])
    for matrix in (low, low + 1e-3 * torch.randn(shape), ill_conditioned(*sorted(shape)).view(shape)):
        found = torch.linalg.svdvals(newton_schulz(matrix, dtype=dtype))
        expected = torch.linalg.svdvals(newton_schulz(matrix, dtype=dtype, backend="reference"))
        assert found.isfinite().all() and found.max() < 1.05
        torch.testing.assert_close(found[:4], expected[:4], rtol=0, atol=0.03)


def test_wide_matrices_use_the_form_with_fewer_multiplications():
    assert not prefers_gram(512, 512, 10, 5) and not prefers_gram(512, 512, 10, 2)
    assert prefers_gram(128, 512, 10, 5) and prefers_gram(256, 512, 10, 2)


@pytest.mark.parametrize("shape", [(64, 64), (2, 50, 90)])
def test_blocked_symmetric_products_equal_the_reference(shape, monkeypatch):
    monkeypatch.setattr(eager, "has_amx", lambda: False)
    monkeypatch.setattr(eager, "_MIN_BLOCKED_ROWS", {torch.float32: 32})
    matrices = torch.randn(shape)
    torch.testing.assert_close(newton_schulz(matrices), newton_schulz(matrices, backend="reference"), rtol=0, atol=1e-5)
