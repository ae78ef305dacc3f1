"""Newton-Schulz iteration with fused products, on the Gram matrix where that takes fewer multiplications.

A step multiplies X from the left by ``P = a I + b A + c A A`` with ``A = X X^T``. Every P is a polynomial of the first
A. For matrices that are much wider than tall, the polynomials are therefore multiplied with each other, [r, r], and
only their product with X, [r, c].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kernels.hardware import has_amx
from kernels.newton_schulz.reference import V4_COEFFICIENTS

STEPS_PER_GRAM_MATRIX = {torch.float32: 5, torch.bfloat16: 2}
"""Steps computed from one Gram matrix. Rounding turns zero eigenvalues into about -eps, and an early step multiplies
them by a ** 2 = 12. That is negligible after 5 steps in float32 and overflows after 10; BF16 overflows after 3."""

SymmetricProduct = Callable[..., Tensor]
"""Function of (left, right, added, beta, alpha) that returns ``alpha left right + beta added``, a symmetric result."""

_MIN_BLOCKED_ROWS = {torch.float32: 256, torch.bfloat16: 1024}
"""Rows from which symmetric products on a CPU skip the blocks below the diagonal, by dtype. Smaller BF16 blocks gain
nothing."""
_MIN_BLOCKED_ROWS_ON_GPU = 1024
"""Limit on a GPU, where small blocks would leave it idle."""


def newton_schulz(
    matrices: Tensor,
    coefficients: Sequence[tuple[float, float, float]] = V4_COEFFICIENTS,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Implement :func:`kernels.newton_schulz.newton_schulz` for float32 and bfloat16 products."""
    return iterate(matrices, coefficients, dtype, _symmetric)


def iterate(
    matrices: Tensor,
    coefficients: Sequence[tuple[float, float, float]],
    dtype: torch.dtype,
    symmetric: SymmetricProduct,
) -> Tensor:
    """Run the iteration with the given product, which returns ``alpha left right + beta added`` for a result known to
    be symmetric."""
    shape = matrices.shape
    rows, columns = sorted(shape[-2:])
    tall = shape[-2] > shape[-1]
    x = (matrices.transpose(-1, -2) if tall else matrices).reshape(-1, rows, columns)
    norms = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    x = (x / (norms + 1e-20)).to(dtype)
    if len(x) == 1:
        x = x[0]  # libraries multiply a single matrix faster without a batch dim
    segment = STEPS_PER_GRAM_MATRIX[dtype]
    step = _gram_steps if prefers_gram(rows, columns, len(coefficients), segment) else _steps
    for begin in range(0, len(coefficients), segment):
        x = step(x, coefficients[begin : begin + segment], symmetric)
    x = x.to(matrices.dtype).view(*shape[:-2], rows, columns)
    return x.transpose(-1, -2) if tall else x


def count_multiplications(rows: int, columns: int, steps: int, segment: int) -> float:
    """Return the scalar multiplications of the cheaper form, for one matrix with ``rows`` <= ``columns``.

    ``segment`` is the number of steps computed from one Gram matrix.
    """
    square, product = rows**3, rows**2 * columns
    segments = -(-steps // segment)
    return min(steps * (2 * product + square), 2 * segments * product + (4 * steps - 3 * segments) * square)


def prefers_gram(rows: int, columns: int, steps: int, segment: int) -> bool:
    """Return whether the iteration on Gram matrices takes fewer multiplications than that on X."""
    return count_multiplications(rows, columns, steps, segment) < steps * (2 * rows**2 * columns + rows**3)


def _steps(x: Tensor, coefficients: Sequence[tuple[float, float, float]], symmetric: SymmetricProduct) -> Tensor:
    for a, b, c in coefficients:
        gram = symmetric(x, x.mT)
        x = _plus_diagonal(symmetric(gram, gram, gram, b, c), a) @ x
    return x


def _gram_steps(x: Tensor, coefficients: Sequence[tuple[float, float, float]], symmetric: SymmetricProduct) -> Tensor:
    gram = symmetric(x, x.mT)
    product: Tensor | None = None
    for i, (a, b, c) in enumerate(coefficients):
        polynomial = symmetric(gram, gram, gram, b, c)  # without the constant term a I
        if product is None:
            product = _plus_diagonal(polynomial.clone(), a)
        else:
            product = symmetric(polynomial, product, product, a)
        if i + 1 < len(coefficients):
            half = symmetric(polynomial, gram, gram, a)
            gram = symmetric(half, polynomial, half, a)
    return x if product is None else product @ x


def _plus_diagonal(x: Tensor, a: float) -> Tensor:
    x.diagonal(dim1=-2, dim2=-1).add_(a)
    return x


def _symmetric(
    left: Tensor, right: Tensor, added: Tensor | None = None, beta: float = 0.0, alpha: float = 1.0
) -> Tensor:
    """Compute :func:`_multiply_add` for a result known to be symmetric.

    For large matrices, the blocks below the diagonal are copied from above it, which saves up to half of the products.
    Not on a CPU with AMX, whose products of submatrices are slower by the same factor.
    """
    rows = left.shape[-2]
    least = _MIN_BLOCKED_ROWS[left.dtype] if left.is_cpu else _MIN_BLOCKED_ROWS_ON_GPU
    if rows < least or (left.device.type == "cpu" and has_amx()):
        return _multiply_add(left, right, added, beta, alpha)
    out = left.new_empty(*left.shape[:-1], rows)
    for begin in range(0, rows, least // 4):
        end = min(rows, begin + least // 4)
        upper = None if added is None else added[..., begin:end, begin:]
        out[..., begin:end, begin:] = _multiply_add(left[..., begin:end, :], right[..., begin:], upper, beta, alpha)
        out[..., end:, begin:end] = out[..., begin:end, end:].mT
    return out


def _multiply_add(left: Tensor, right: Tensor, added: Tensor | None, beta: float, alpha: float = 1.0) -> Tensor:
    """Return ``alpha left right + beta added``, for matrices [r, c] or batches of them."""
    if added is None:
        return left @ right
    fused = torch.addmm if left.dim() == 2 else torch.baddbmm
    return fused(added, left, right, beta=beta, alpha=alpha)
