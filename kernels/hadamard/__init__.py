"""Orthonormal Walsh-Hadamard rotation.

It spreads outliers over a block before FP4 rounding. Inner products of two rotated vectors are unchanged.
"""

from __future__ import annotations

from torch import Tensor

from kernels import native
from kernels.backends import get_backend
from kernels.hadamard import cpu, reference

__all__ = ["BACKENDS", "backend_for", "hadamard"]

BACKENDS = {"reference": reference, "cpu": cpu}


def backend_for(x: Tensor) -> str:
    """Return the backend for x."""
    return "cpu" if native.serves(x) else "reference"


def hadamard(x: Tensor, backend: str | None = None) -> Tensor:
    """Rotate the last dim of x [..., n], n a power of two. The rotation is its own inverse.

    The ``cpu`` backend requires float32 and disabled gradients. Raises ValueError if n is not a power of two.
    """
    return get_backend(BACKENDS, backend or backend_for(x)).hadamard(x)
