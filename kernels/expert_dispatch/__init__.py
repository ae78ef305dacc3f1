"""Tokens' rows to the experts that they chose, and the sums of what comes back.

``written_out.py`` runs, but for compiled code, which has ``reference.py``; ``backend=`` chooses by hand and
:func:`backend_for` tells which one runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.expert_dispatch import reference, written_out
from kernels.expert_dispatch.reference import Dispatch, by_expert

BACKENDS = {"reference": reference, "written_out": written_out}


def backend_for(x: Tensor) -> str:
    return "reference" if torch.compiler.is_compiling() else "written_out"


def dispatch(x: Tensor, to: Dispatch, dtype: torch.dtype, backend: str | None = None) -> Tensor:
    """See :func:`kernels.expert_dispatch.reference.dispatch`."""
    return BACKENDS[backend or backend_for(x)].dispatch(x, to, dtype)


def combine(rows: Tensor, to: Dispatch, dtype: torch.dtype, backend: str | None = None) -> Tensor:
    """See :func:`kernels.expert_dispatch.reference.combine`."""
    return BACKENDS[backend or backend_for(rows)].combine(rows, to, dtype)


__all__ = ["BACKENDS", "Dispatch", "backend_for", "by_expert", "combine", "dispatch"]
