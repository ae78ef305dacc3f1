"""SwiGLU: native without gradients (``cpu.cpp``), with a backward pass of its own elsewhere (``written_out.py``).

``backend=`` forces one and :func:`backend_for` tells which one runs.
"""

from __future__ import annotations

from torch import Tensor

from kernels import native
from kernels.swiglu import cpu, reference, written_out

BACKENDS = {"reference": reference, "written_out": written_out, "cpu": cpu}


def backend_for(gate: Tensor, gain: Tensor | None = None) -> str:
    return "cpu" if gain is None and native.serves(gate) else "written_out"


def swiglu(gate: Tensor, up: Tensor, limit: float, gain: Tensor | None = None, backend: str | None = None) -> Tensor:
    """See :func:`kernels.swiglu.reference.swiglu`."""
    return BACKENDS[backend or backend_for(gate, gain)].swiglu(gate, up, limit, gain)


__all__ = ["BACKENDS", "backend_for", "swiglu"]
