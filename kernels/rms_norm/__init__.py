"""RMS normalization (arXiv 1910.07467)."""

from __future__ import annotations

from torch import Tensor

from kernels import native
from kernels.backends import get_backend
from kernels.rms_norm import cpu, eager, reference

__all__ = ["BACKENDS", "backend_for", "rms_norm"]

BACKENDS = {"reference": reference, "eager": eager, "cpu": cpu}


def backend_for(x: Tensor) -> str:
    """Return the backend for x. The ``cpu`` backend has a backward pass."""
    return "cpu" if native.serves(x, backward=True, bf16=True) else "eager"


def rms_norm(x: Tensor, eps: float, weight: Tensor | None = None, backend: str | None = None) -> Tensor:
    """Return ``x / sqrt(mean(x^2) + eps) * weight``, with the mean over the last dim.

    Args:
        x: [..., n]. The ``cpu`` backend requires float32 or BF16.
        eps: Added to the mean square.
        weight: float32 [n], or None for no scaling.

    Returns:
        float32 [..., n].
    """
    return get_backend(BACKENDS, backend or backend_for(x)).rms_norm(x, eps, weight)
