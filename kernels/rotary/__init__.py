"""Rotary positions: as in ``reference.py`` where they are compiled, as complex numbers elsewhere (``as_complex.py``).

``backend=`` chooses by hand and :func:`backend_for` tells which one runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.rotary import as_complex, reference

BACKENDS = {"reference": reference, "as_complex": as_complex}


def backend_for(x: Tensor) -> str:
    return "reference" if torch.compiler.is_compiling() else "as_complex"  # compilers know no complex numbers


def rotate(x: Tensor, cos: Tensor, sin: Tensor, backend: str | None = None) -> Tensor:
    """See :func:`kernels.rotary.reference.rotate`."""
    return BACKENDS[backend or backend_for(x)].rotate(x, cos, sin)


__all__ = ["BACKENDS", "backend_for", "rotate"]
