"""Run by test_interpreted.py with TRITON_INTERPRET=1."""

import pytest
import torch

from kernels.compress import compress, compress_next


def run(backend, given, *options):
    rows, bias = (x.clone().requires_grad_() for x in given)
    out = compress(rows, bias, *options, backend=backend)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)))
    return out.detach(), rows.grad, bias.grad


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(
    ("m", "blocks", "c", "overlap", "has_previous"),
    [(4, 5, 20, True, False), (4, 5, 20, True, True), (3, 1, 16, True, False), (16, 2, 33, False, False)],
)
def test_pooling_equals_the_reference_forward_and_backward(m, blocks, c, overlap, has_previous, documents):
    w = 2 * c if overlap else c
    given = torch.randn(2, blocks * m, 2 * w), torch.randn(m, w)
    starts = torch.rand(2, blocks) < 0.5 if documents else None
    found, expected = (run(backend, given, overlap, has_previous, starts) for backend in ("triton", "reference"))
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_gates_far_apart_and_no_blocks():
    given = torch.randn(1, 8, 64) * 200, torch.zeros(4, 32)
    for x, y in zip(run("triton", given, True), run("reference", given, True)):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-4)
    assert compress(torch.zeros(1, 0, 64), torch.zeros(4, 32), True, backend="triton").shape == (1, 0, 16)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("new", [1, 2, 9])
@torch.no_grad()
def test_completed_blocks_of_a_ragged_batch(overlap, new):
    m, w, lengths = 4, 40, [0, 1, 3, 4, 7, 22]
    given = (
        torch.randn(len(lengths), 9, 2 * w),
        torch.randn(len(lengths), new, 2 * w),
        torch.randn(m, w),
        lengths,
        overlap,
    )
    found, expected = (compress_next(*given, backend=backend) for backend in ("triton", "reference"))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_unsupported_dtypes_are_refused_with_the_supported_set():
    with pytest.raises(ValueError, match=r"supports dtypes float32; found bfloat16$"):
        compress(torch.zeros(1, 4, 64).bfloat16(), torch.zeros(4, 32), True, backend="triton")
