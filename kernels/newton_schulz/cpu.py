"""Newton-Schulz iteration with symmetric BF16 products by a native operator, which computes half of their blocks.

The iteration is that of :mod:`kernels.newton_schulz.eager`. Products with X, which are not symmetric, are PyTorch's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import native
from kernels.hardware import has_amx, multiplies_bf16_fast
from kernels.newton_schulz.eager import iterate
from kernels.newton_schulz.reference import V4_COEFFICIENTS

MIN_ROWS = 64
"""Rows from which the operator runs by default. Of fewer, most blocks touch the diagonal."""


def supports(matrices: Tensor, dtype: torch.dtype) -> bool:
    """Return whether the backend runs by default for these matrices: BF16 products on a CPU with AVX512-BF16.

    AMX multiplies more than twice as fast, so PyTorch's products, which use it, run there.
    """
    return (
        dtype == torch.bfloat16
        and min(matrices.shape[-2:]) >= MIN_ROWS
        and native.serves(matrices, bf16=True)
        and native.level() == "avx512"
        and multiplies_bf16_fast("cpu")
        and not has_amx()
    )


def newton_schulz(
    matrices: Tensor,
    coefficients: Sequence[tuple[float, float, float]] = V4_COEFFICIENTS,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Implement :func:`kernels.newton_schulz.newton_schulz` for BF16 products, without gradients.

    Raises ValueError for other dtypes and on processors without AVX512-BF16.
    """
    if dtype != torch.bfloat16 or not matrices.is_cpu or not multiplies_bf16_fast("cpu"):
        raise ValueError(
            f"newton_schulz: backend 'cpu' supports bfloat16 products on CPUs with AVX512-BF16; found {dtype} products"
        )
    return iterate(matrices, coefficients, dtype, _symmetric)


def _symmetric(
    left: Tensor, right: Tensor, added: Tensor | None = None, beta: float = 0.0, alpha: float = 1.0
) -> Tensor:
    """Return ``alpha left right + beta added``, known to be symmetric, for matrices [r, c] and [c, r] or batches.

    With ``added``, ``right`` is symmetric, too: its rows then serve as its columns.
    """
    rows = right.mT if added is None else right
    return native.op("symmetric_product")(left.contiguous(), rows.contiguous(), added, beta, alpha)
