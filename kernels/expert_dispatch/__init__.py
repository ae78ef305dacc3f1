"""Tokens' rows to the experts that they chose, and the sums of what comes back.

``written_out.py`` runs; ``backend="reference"`` is the readable twin.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.expert_dispatch import reference, written_out
from kernels.expert_dispatch.reference import Dispatch, by_expert

BACKENDS = {"reference": reference, "written_out": written_out}


def dispatch(x: Tensor, to: Dispatch, dtype: torch.dtype, backend: str = "written_out") -> Tensor:
    """See :func:`kernels.expert_dispatch.reference.dispatch`."""
    return BACKENDS[backend].dispatch(x, to, dtype)


def combine(rows: Tensor, to: Dispatch, dtype: torch.dtype, backend: str = "written_out") -> Tensor:
    """See :func:`kernels.expert_dispatch.reference.combine`."""
    return BACKENDS[backend].combine(rows, to, dtype)


__all__ = ["BACKENDS", "Dispatch", "by_expert", "combine", "dispatch"]
