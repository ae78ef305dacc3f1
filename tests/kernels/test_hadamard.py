import pytest
import torch
from backend_testing import needs_native

from kernels.hadamard import hadamard


def test_rotating_both_vectors_preserves_inner_products():
    q, k = torch.randn(8, 32, dtype=torch.float64), torch.randn(20, 32, dtype=torch.float64)
    torch.testing.assert_close(hadamard(q) @ hadamard(k).T, q @ k.T)
    torch.testing.assert_close(hadamard(hadamard(q)), q)
    assert not torch.allclose(hadamard(q) @ k.T, q @ k.T, atol=0.1)
    with pytest.raises(ValueError, match="power of two"):
        hadamard(torch.randn(2, 24))


@needs_native
@pytest.mark.parametrize("size", [1, 2, 16, 128])
@torch.no_grad()
def test_cpu_equals_the_reference(size):
    x = torch.randn(3, 4, size)
    found, expected = (hadamard(x, backend=b) for b in ("cpu", "reference"))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="power of two, found 12"):
        hadamard(torch.randn(2, 12), backend="cpu")
