import pytest
import torch

from kernels.newton_schulz import newton_schulz


@pytest.mark.parametrize("shape", [(8, 8), (16, 64), (64, 16), (5, 24, 12)])
def test_singular_values_go_to_one_and_directions_stay(shape):
    torch.manual_seed(0)
    matrix = torch.randn(*shape)
    out = newton_schulz(matrix)
    values = torch.linalg.svdvals(out)
    assert values.min() > 0.7 and values.max() < 1.2
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    polar = u @ vh
    cosine = (out * polar).sum() / (out.norm() * polar.norm())
    assert cosine > 0.99


def test_a_batch_equals_its_matrices_one_by_one():
    batch = torch.randn(4, 12, 20)
    torch.testing.assert_close(
        newton_schulz(batch), torch.stack([newton_schulz(m) for m in batch]), rtol=1e-4, atol=1e-5
    )


def test_zero_stays_zero():
    assert newton_schulz(torch.zeros(6, 4)).abs().max() == 0
