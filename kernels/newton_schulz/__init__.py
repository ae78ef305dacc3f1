"""Orthogonalization of matrices by Newton-Schulz iteration, the inner loop of Muon (report 2.4, algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.backends import get_backend
from kernels.newton_schulz import cpu, eager, reference, triton
from kernels.newton_schulz.eager import STEPS_PER_GRAM_MATRIX, count_multiplications
from kernels.newton_schulz.reference import V4_COEFFICIENTS
from kernels.triton_support.platform import can_run

__all__ = [
    "BACKENDS",
    "STEPS_PER_GRAM_MATRIX",
    "V4_COEFFICIENTS",
    "backend_for",
    "count_multiplications",
    "newton_schulz",
]

BACKENDS = {"reference": reference, "eager": eager, "cpu": cpu, "triton": triton}


def backend_for(matrices: Tensor, dtype: torch.dtype = torch.float32) -> str:
    """Return the backend for matrices and products of this dtype."""
    if can_run(matrices) and triton.supports(matrices, dtype):
        return "triton"
    return "cpu" if cpu.supports(matrices, dtype) else "eager"


def newton_schulz(
    matrices: Tensor,
    coefficients: Sequence[tuple[float, float, float]] = V4_COEFFICIENTS,
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> Tensor:
    """Approximate the polar factor U V^T of every matrix; singular values go to about one.

    Each step is ``X <- a X + (b A + c A A) X`` with ``A = X X^T``, starting from ``X / ||X||_F``. A is formed on the
    shorter side. An all-zero matrix stays zero.

    Args:
        matrices: [..., r, c], any float dtype.
        coefficients: (a, b, c) of every step.
        dtype: Dtype of the products, float32 or bfloat16. The ``reference`` backend accepts any float dtype.

    Returns:
        [..., r, c] in the dtype of ``matrices``.
    """
    return get_backend(BACKENDS, backend or backend_for(matrices, dtype)).newton_schulz(matrices, coefficients, dtype)
