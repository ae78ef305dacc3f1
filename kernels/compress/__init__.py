"""Pooling of neighboring tokens into one compressed entry.

Native on a CPU without gradients (``cpu.cpp``), as written in ``reference.py`` elsewhere. ``backend=`` forces one and
:func:`backend_for` tells which one runs.
"""

from __future__ import annotations

from torch import Tensor

from kernels import native
from kernels.compress import cpu, reference

BACKENDS = {"reference": reference, "cpu": cpu}


def backend_for(rows: Tensor, starts: Tensor | None) -> str:
    return "cpu" if starts is None and native.serves(rows) else "reference"


def compress(
    rows: Tensor,
    bias: Tensor,
    overlap: bool,
    has_previous: bool = False,
    starts: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """See :func:`kernels.compress.reference.compress`."""
    return BACKENDS[backend or backend_for(rows, starts)].compress(rows, bias, overlap, has_previous, starts)


__all__ = ["BACKENDS", "backend_for", "compress"]
