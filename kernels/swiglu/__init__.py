"""SwiGLU activation with clamped inputs (report 4.2.3)."""

from __future__ import annotations

from torch import Tensor

from kernels import native
from kernels.backends import get_backend
from kernels.swiglu import cpu, eager, reference

__all__ = ["BACKENDS", "backend_for", "swiglu"]

BACKENDS = {"reference": reference, "eager": eager, "cpu": cpu}


def backend_for(gate: Tensor) -> str:
    """Return the backend for gate. The ``cpu`` backend has a backward pass."""
    return "cpu" if native.serves(gate, backward=True, bf16=True) else "eager"


def swiglu(gate: Tensor, up: Tensor, limit: float, gain: Tensor | None = None, backend: str | None = None) -> Tensor:
    """Return ``silu(gate) * up * gain``, with gate clamped to at most ``limit`` and up to [-limit, limit].

    Values equal to the limit pass gradients.

    Args:
        gate: [..., n]. The ``cpu`` backend requires float32 or BF16.
        up: [..., n], in the dtype of gate.
        limit: Clamping bound.
        gain: float32 [..., 1], or None for no scaling.

    Returns:
        [..., n] in the dtype of gate, computed in float32.
    """
    return get_backend(BACKENDS, backend or backend_for(gate)).swiglu(gate, up, limit, gain)
