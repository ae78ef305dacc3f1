"""Rotary position embedding (arXiv 2104.09864) on interleaved pairs, or on pairs of two halves."""

from __future__ import annotations

from torch import Tensor

from kernels import native
from kernels.backends import get_backend
from kernels.rotary import cpu, eager, reference
from kernels.rotary.reference import rotate_halves

__all__ = ["BACKENDS", "angles", "backend_for", "rotate", "rotate_halves"]

BACKENDS = {"reference": reference, "eager": eager, "cpu": cpu}


def backend_for(x: Tensor) -> str:
    """Return the backend for x: values to rotate, or positions."""
    if x.is_floating_point():
        return "cpu" if native.serves(x, backward=True, bf16=True) else "eager"
    return "cpu" if x.is_cpu and native.level() is not None else "eager"


def rotate(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False, backend: str | None = None) -> Tensor:
    """Rotate the pairs (2k, 2k + 1) of the last ``2 * r`` dims of x; other dims are unchanged.

    Args:
        x: [B, S, ..., n] with n >= 2 * r. The ``cpu`` backend requires float32 or BF16.
        cos: float32 [B or 1, S, r], the cosines of the angles.
        sin: float32 [B or 1, S, r], the sines of the angles.
        inverse: Rotate by the opposite angles.

    Returns:
        The shape of x, in the wider of its dtype and float32.
    """
    return get_backend(BACKENDS, backend or backend_for(x)).rotate(x, cos, sin, inverse)


def angles(positions: Tensor, frequencies: Tensor, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Return cosines and sines, float32 [B, S, r] each, of positions int64 [B, S] times frequencies float64 [r].

    Angles are computed in float64: at a million tokens float32 would lose the fraction of a turn. ``eager`` and
    ``reference`` share one implementation.
    """
    return get_backend(BACKENDS, backend or backend_for(positions)).angles(positions, frequencies)
