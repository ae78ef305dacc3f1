"""Run by test_interpreted.py with TRITON_INTERPRET=1."""

import pytest
import torch

from kernels.newton_schulz import newton_schulz, triton
from kernels.newton_schulz.triton import blocks_of, symmetric_product
from kernels.triton_support.tiles import Tile
from tests.kernels.backend_testing import poison_new_tensors


@pytest.mark.parametrize("wide", [16, 32, 64])
@pytest.mark.parametrize(("rows", "columns"), [(16, 16), (33, 20), (50, 7), (1, 40), (150, 17)])
def test_symmetric_products_compute_blocks_above_the_diagonal_and_mirror_them(rows, columns, wide, monkeypatch):
    tile = Tile(4, 1, {"BLOCK_M": 16, "BLOCK_N": wide, "BLOCK_K": 16})
    monkeypatch.setitem(triton.TILES, "interpreter", (tile,))
    firsts = [(i, j) for i in range(0, rows, 16) for j in range(0, rows, wide) if j + wide > i]
    assert blocks_of(rows, tile) == len(firsts)
    x = torch.randn(2, rows, columns)
    poison_new_tensors(monkeypatch)
    found = symmetric_product(x, x.mT)
    torch.testing.assert_close(found, x @ x.mT, rtol=1e-5, atol=1e-5)
    assert torch.equal(found, found.mT)
    gram = x @ x.mT
    expected = 0.5 * (gram @ gram) - 2 * gram
    torch.testing.assert_close(symmetric_product(gram, gram, gram, -2.0, 0.5), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("shape", [(18, 40), (2, 20, 17), (6, 60)])
def test_the_iteration_equals_the_reference(shape):
    matrices = torch.randn(shape)
    found, expected = (newton_schulz(matrices, backend=backend) for backend in ("triton", "reference"))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_zero_matrices_stay_zero():
    assert not newton_schulz(torch.zeros(3, 5), backend="triton").any()


def test_unsupported_dtypes_are_refused_with_the_supported_set():
    with pytest.raises(ValueError, match=r"supports dtypes bfloat16, float32; found float16$"):
        newton_schulz(torch.zeros(3, 5), dtype=torch.float16, backend="triton")
