"""Newton-Schulz iteration with fused products, and on the Gram matrix where that is less work."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.cpu import has_amx

SEGMENTS = {torch.float32: 5, torch.bfloat16: 2}
"""Iterations from one Gram matrix on. Rounding leaves eigenvalues of about -eps where there should be none, and an
early step multiplies them by a ** 2 = 12: after 5 steps in float32 that is still nothing, 10 overflow; in BF16 so do
3."""

_LARGE = 1024


def newton_schulz_gram(
    matrices: Tensor, coefficients: Sequence[tuple[float, float, float]], dtype: torch.dtype
) -> Tensor:
    """What :func:`kernels.newton_schulz.reference.newton_schulz` computes, in float32 or bfloat16, rounded elsewhere.

    A step multiplies X from the left by ``P = a + b A + c A A`` with ``A = X X^T``, and every P is a polynomial of the
    first A. So for matrices that are much wider than high the polynomials are multiplied with each other, [r, r], and
    only their product with X.
    """
    shape = matrices.shape
    rows, columns = sorted(shape[-2:])
    tall = shape[-2] > shape[-1]
    x = (matrices.transpose(-1, -2) if tall else matrices).reshape(-1, rows, columns)
    norms = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    x = (x / (norms + 1e-20)).to(dtype)
    if len(x) == 1:
        x = x[0]  # a library multiplies one matrix faster without a batch around it
    segment = SEGMENTS[dtype]
    step = _gram_steps if prefers_gram(rows, columns, len(coefficients), segment) else _steps
    for begin in range(0, len(coefficients), segment):
        x = step(x, coefficients[begin : begin + segment])
    x = x.to(matrices.dtype).view(*shape[:-2], rows, columns)
    return x.transpose(-1, -2) if tall else x


def multiplications(rows: int, columns: int, steps: int, segment: int) -> float:
    """Of numbers, for one matrix with ``rows`` <= ``columns``, in the form that takes fewer."""
    square, product = rows**3, rows**2 * columns
    segments = -(-steps // segment)
    return min(steps * (2 * product + square), 2 * segments * product + (4 * steps - 3 * segments) * square)


def prefers_gram(rows: int, columns: int, steps: int, segment: int) -> bool:
    """Whether that is the Gram form."""
    return multiplications(rows, columns, steps, segment) < steps * (2 * rows**2 * columns + rows**3)


def _steps(x: Tensor, coefficients: Sequence[tuple[float, float, float]]) -> Tensor:
    for a, b, c in coefficients:
        gram = _symmetric(x, x.mT)
        x = _plus_diagonal(_symmetric(gram, gram, gram, b, c), a) @ x
    return x


def _gram_steps(x: Tensor, coefficients: Sequence[tuple[float, float, float]]) -> Tensor:
    gram = _symmetric(x, x.mT)
    product: Tensor | None = None
    for i, (a, b, c) in enumerate(coefficients):
        polynomial = _symmetric(gram, gram, gram, b, c)  # without its constant a
        if product is None:
            product = _plus_diagonal(polynomial.clone(), a)
        else:
            product = _symmetric(polynomial, product, product, a)
        if i + 1 < len(coefficients):
            half = _symmetric(polynomial, gram, gram, a)
            gram = _symmetric(half, polynomial, half, a)
    return x if product is None else product @ x


def _plus_diagonal(x: Tensor, a: float) -> Tensor:
    x.diagonal(dim1=-2, dim2=-1).add_(a)
    return x


def _symmetric(
    left: Tensor, right: Tensor, added: Tensor | None = None, beta: float = 0.0, alpha: float = 1.0
) -> Tensor:
    """:func:`_multiply_add` where the result is known to be symmetric: of large matrices the blocks below the diagonal
    are copied from above it, which saves up to half of the products. Small ones are multiplied whole, in one call, and
    so are all where a CPU has AMX: its products of parts of a matrix are slower by as much."""
    rows = left.shape[-2]
    if rows < _LARGE or (left.device.type == "cpu" and has_amx()):
        return _multiply_add(left, right, added, beta, alpha)
    out = left.new_empty(*left.shape[:-1], rows)
    for begin in range(0, rows, _LARGE // 4):
        end = min(rows, begin + _LARGE // 4)
        upper = None if added is None else added[..., begin:end, begin:]
        out[..., begin:end, begin:] = _multiply_add(left[..., begin:end, :], right[..., begin:], upper, beta, alpha)
        out[..., end:, begin:end] = out[..., begin:end, end:].mT
    return out


def _multiply_add(left: Tensor, right: Tensor, added: Tensor | None, beta: float, alpha: float = 1.0) -> Tensor:
    """``alpha left right + beta added`` for matrices [r, c] or batches of them."""
    if added is None:
        return left @ right
    fused = torch.addmm if left.dim() == 2 else torch.baddbmm
    return fused(added, left, right, beta=beta, alpha=alpha)
