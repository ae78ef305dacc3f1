"""SwiGLU: as in ``reference.py`` where it is compiled, with a backward pass of its own elsewhere (``written_out.py``).

``backend=`` chooses by hand and :func:`backend_for` tells which one runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.swiglu import reference, written_out

BACKENDS = {"reference": reference, "written_out": written_out}


def backend_for(gate: Tensor) -> str:
    return "reference" if torch.compiler.is_compiling() else "written_out"


def swiglu(gate: Tensor, up: Tensor, limit: float, gain: Tensor | None = None, backend: str | None = None) -> Tensor:
    """See :func:`kernels.swiglu.reference.swiglu`."""
    return BACKENDS[backend or backend_for(gate)].swiglu(gate, up, limit, gain)


__all__ = ["BACKENDS", "backend_for", "swiglu"]
