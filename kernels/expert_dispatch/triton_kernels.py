"""Triton kernels of products with the experts' matrices. See :mod:`kernels.expert_dispatch.triton`.

Rows are grouped by expert. ``offsets`` [experts + 1] are the first rows of the experts, and the number of rows. Offsets
that grow with rows are int64. ``UPCAST`` converts operands to float32, for the interpreter, which multiplies BF16
wrongly.
"""

import triton
import triton.language as tl


@triton.jit
def _load(base, i, j, rows, columns, UPCAST: tl.constexpr):
    """Load elements (i, j) of a matrix [rows, columns]; zeros outside of it."""
    inside = (i < rows)[:, None] & (j < columns)[None, :]
    tile = tl.load(base + i.to(tl.int64)[:, None] * columns + j[None, :], mask=inside, other=0.0)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def multiply(
    rows, stack, offsets, experts, first_rows, out,
    N, K,
    TRANSPOSED: tl.constexpr, UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Multiply rows [rows, K] by their experts' matrices: ``rows stack[e]^T`` for a stack [experts, N, K], or with
    ``TRANSPOSED``, ``rows stack[e]`` for a stack [experts, K, N]. Write [rows, N].

    A program computes some columns of a tile of rows. Tiles name an expert and a first row; those without an expert,
    -1, compute nothing.
    """
    parts = tl.cdiv(N, BLOCK_N)
    tile = tl.program_id(0) // parts
    expert = tl.load(experts + tile).to(tl.int64)
    if expert >= 0:
        row = tl.load(first_rows + tile) + tl.arange(0, BLOCK_M)
        end = tl.load(offsets + expert + 1)
        n = tl.program_id(0) % parts * BLOCK_N + tl.arange(0, BLOCK_N)
        matrix = stack + expert * N * K
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for begin in range(0, K, BLOCK_K):
            k = begin + tl.arange(0, BLOCK_K)
            x = _load(rows, row, k, end, K, UPCAST)
            if TRANSPOSED:
                w = _load(matrix, k, n, K, N, UPCAST)
            else:
                w = tl.trans(_load(matrix, n, k, N, K, UPCAST))
            acc = tl.dot(x, w, acc, input_precision="ieee")
        at = row.to(tl.int64)[:, None] * N + n[None, :]
        tl.store(out + at, acc.to(out.dtype.element_ty), mask=(row < end)[:, None] & (n < N)[None, :])


@triton.jit
def multiply_rows(
    left, right, offsets, out,
    M, N,
    UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write ``left^T right`` over the rows of every expert, [experts, M, N], for left [rows, M] and right [rows, N].

    Experts without rows get zeros. Program ids: part of M, part of N, expert.
    """
    expert = tl.program_id(2).to(tl.int64)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    end = tl.load(offsets + expert + 1)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for begin in range(tl.load(offsets + expert), end, BLOCK_K):
        row = begin + tl.arange(0, BLOCK_K)
        x = _load(left, row, m, end, M, UPCAST)
        y = _load(right, row, n, end, N, UPCAST)
        acc = tl.dot(tl.trans(x), y, acc, input_precision="ieee")
    at = expert * M * N + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])
