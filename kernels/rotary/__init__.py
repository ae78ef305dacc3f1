"""Rotary positions: native without gradients (``cpu.cpp``), as complex numbers elsewhere (``as_complex.py``).

``backend=`` forces one and :func:`backend_for` tells which one runs.
"""

from __future__ import annotations

from torch import Tensor

from kernels import native
from kernels.rotary import as_complex, cpu, reference

BACKENDS = {"reference": reference, "as_complex": as_complex, "cpu": cpu}


def backend_for(x: Tensor) -> str:
    return "cpu" if native.serves(x) else "as_complex"


def rotate(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False, backend: str | None = None) -> Tensor:
    """See :func:`kernels.rotary.reference.rotate`."""
    return BACKENDS[backend or backend_for(x)].rotate(x, cos, sin, inverse)


def angles(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`kernels.rotary.reference.angles`. Native on a CPU."""
    if positions.is_cpu and native.level() is not None:
        return cpu.angles(positions, frequencies)
    return reference.angles(positions, frequencies)


__all__ = ["BACKENDS", "angles", "backend_for", "rotate"]
