"""Triton kernel of symmetric products. See :mod:`kernels.newton_schulz.triton`."""

import triton
import triton.language as tl


@triton.jit
def symmetric(
    left, right, added, out,
    R, C, alpha, beta,
    HAS_ADDED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write ``alpha left right^T + beta added`` [R, R], known to be symmetric, for left and right [R, C].

    A program computes one block that reaches the diagonal or lies above it, and stores the elements above the diagonal
    twice. Program ids: block, matrix. ``BLOCK_N`` is a multiple of ``BLOCK_M``: column j of blocks has (j + 1) times as
    many as a square, from the top, and the columns follow each other.
    """
    SQUARE: tl.constexpr = BLOCK_N // BLOCK_M
    t = tl.program_id(0) // SQUARE
    j = ((tl.sqrt(8.0 * t.to(tl.float32) + 1.0) - 1.0) / 2.0).to(tl.int32)
    j = tl.where(j * (j + 1) // 2 > t, j - 1, j)  # the root is rounded
    j = tl.where((j + 1) * (j + 2) // 2 <= t, j + 1, j)
    i = tl.program_id(0) - SQUARE * (j * (j + 1) // 2)
    b = tl.program_id(1).to(tl.int64)
    # Offsets within a block are 32-bit, which saves registers; those of blocks are 64-bit.
    row = i.to(tl.int64) * BLOCK_M
    column = j.to(tl.int64) * BLOCK_N
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    has_row = m < R - row
    has_column = n < R - column
    at_left = left + (b * R + row) * C
    at_right = right + (b * R + column) * C
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for begin in range(0, C, BLOCK_K):
        k = begin + tl.arange(0, BLOCK_K)
        x = tl.load(at_left + (m[:, None] * C + k[None, :]), mask=has_row[:, None] & (k < C)[None, :], other=0.0)
        y = tl.load(at_right + (n[:, None] * C + k[None, :]), mask=has_column[:, None] & (k < C)[None, :], other=0.0)
        if UPCAST:
            x, y = x.to(tl.float32), y.to(tl.float32)
        acc = tl.dot(x, tl.trans(y), acc, input_precision=PRECISION)
    acc = acc * alpha
    inside = has_row[:, None] & has_column[None, :]
    block = (b * R + row) * R + column
    at = m[:, None] * R + n[None, :]
    if HAS_ADDED:
        acc += beta * tl.load(added + block + at, mask=inside, other=0.0).to(tl.float32)
    acc = acc.to(out.dtype.element_ty)
    mirrored = out + (b * R + column) * R + row + (n[:, None] * R + m[None, :])
    mirrored_inside = has_column[:, None] & has_row[None, :]
    if column >= row + BLOCK_M:
        tl.store(out + block + at, acc, mask=inside)
        tl.store(mirrored, tl.trans(acc), mask=mirrored_inside)
    else:
        below = (row - column).to(tl.int32)  # by which an element's column must exceed its row
        tl.store(out + block + at, acc, mask=inside & (n[None, :] - m[:, None] >= below))
        tl.store(mirrored, tl.trans(acc), mask=mirrored_inside & (n[:, None] - m[None, :] > below))
