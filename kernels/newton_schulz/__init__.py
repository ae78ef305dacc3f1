"""Orthogonalisation of matrices by Newton-Schulz iteration: Muon's inner loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from kernels.newton_schulz import reference
from kernels.newton_schulz.gram import newton_schulz_gram
from kernels.newton_schulz.reference import V4_COEFFICIENTS

__all__ = ["V4_COEFFICIENTS", "newton_schulz"]


def newton_schulz(
    matrices: Tensor,
    coefficients: Sequence[tuple[float, float, float]] = V4_COEFFICIENTS,
    dtype: torch.dtype = torch.float32,
    backend: Literal["fused", "reference"] = "fused",
) -> Tensor:
    """Approximate polar factors of matrices [..., r, c], computed in ``dtype`` (float32 or bfloat16; ``reference``
    takes any float) and returned in the input's: :func:`kernels.newton_schulz.reference.newton_schulz`. ``fused``
    computes it with fewer and larger products."""
    run = reference.newton_schulz if backend == "reference" else newton_schulz_gram
    return run(matrices, coefficients, dtype)
