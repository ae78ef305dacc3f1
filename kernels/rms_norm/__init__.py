"""RMS normalization: native without gradients (``cpu.cpp``), with a backward pass of its own elsewhere
(``written_out.py``).

``backend=`` forces one and :func:`backend_for` tells which one runs.
"""

from __future__ import annotations

from torch import Tensor

from kernels import native
from kernels.rms_norm import cpu, reference, written_out

BACKENDS = {"reference": reference, "written_out": written_out, "cpu": cpu}


def backend_for(x: Tensor) -> str:
    return "cpu" if native.serves(x) else "written_out"


def rms_normalize(x: Tensor, eps: float, weight: Tensor | None = None, backend: str | None = None) -> Tensor:
    """See :func:`kernels.rms_norm.reference.rms_normalize`."""
    return BACKENDS[backend or backend_for(x)].rms_normalize(x, eps, weight)


__all__ = ["BACKENDS", "backend_for", "rms_normalize"]
