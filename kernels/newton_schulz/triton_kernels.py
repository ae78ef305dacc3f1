"""Triton kernel of symmetric products. See :mod:`kernels.newton_schulz.triton`."""

import triton
import triton.language as tl


@triton.jit
def symmetric(
    left, right, added, out,
    R, C, alpha, beta,
    HAS_ADDED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write ``alpha left right^T + beta added`` [R, R], known to be symmetric, for left and right [R, C].

    A program computes one block on or above the diagonal and stores it twice. Program ids: block, matrix. Block t is in
    row i and column j >= i, in the order (0, 0), (0, 1), (1, 1), (0, 2), ...
    """
    t = tl.program_id(0)
    j = ((tl.sqrt(8.0 * t.to(tl.float32) + 1.0) - 1.0) / 2.0).to(tl.int32)
    j = tl.where(j * (j + 1) // 2 > t, j - 1, j)  # the root is rounded
    j = tl.where((j + 1) * (j + 2) // 2 <= t, j + 1, j)
    i = t - j * (j + 1) // 2
    b = tl.program_id(1).to(tl.int64)
    rows = i * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    columns = j * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    at_left = left + b * R * C + rows[:, None] * C
    at_right = right + b * R * C + columns[:, None] * C
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for begin in range(0, C, BLOCK_K):
        k = begin + tl.arange(0, BLOCK_K)
        x = tl.load(at_left + k[None, :], mask=(rows < R)[:, None] & (k < C)[None, :], other=0.0)
        y = tl.load(at_right + k[None, :], mask=(columns < R)[:, None] & (k < C)[None, :], other=0.0)
        if UPCAST:
            x, y = x.to(tl.float32), y.to(tl.float32)
        acc = tl.dot(x, tl.trans(y), acc, input_precision=PRECISION)
    acc = acc * alpha
    inside = (rows < R)[:, None] & (columns < R)[None, :]
    at = b * R * R + rows[:, None] * R + columns[None, :]
    if HAS_ADDED:
        acc += beta * tl.load(added + at, mask=inside, other=0.0).to(tl.float32)
    acc = acc.to(out.dtype.element_ty)
    tl.store(out + at, acc, mask=inside)
    if i != j:
        mirrored = b * R * R + columns[:, None] * R + rows[None, :]
        tl.store(out + mirrored, tl.trans(acc), mask=tl.trans(inside))
