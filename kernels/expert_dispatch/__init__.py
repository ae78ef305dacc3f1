"""Movement of tokens to the experts that they are routed to, and combination of the experts' outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.backends import get_backend
from kernels.expert_dispatch import eager, reference
from kernels.expert_dispatch.permutation import Dispatch, by_expert

__all__ = ["BACKENDS", "Dispatch", "backend_for", "by_expert", "combine", "dispatch"]

BACKENDS = {"reference": reference, "eager": eager}


def backend_for(x: Tensor) -> str:
    """Return the backend for tokens or rows."""
    return "eager"


def dispatch(x: Tensor, plan: Dispatch, dtype: torch.dtype, backend: str | None = None) -> Tensor:
    """Return the token of every row, in ``dtype``: x [N, d] to [rows, d].

    Padding rows hold the first token. Callers must give them no weight: the ``eager`` backend passes no gradient
    through them.
    """
    return get_backend(BACKENDS, backend or backend_for(x)).dispatch(x, plan, dtype)


def combine(rows: Tensor, plan: Dispatch, dtype: torch.dtype, backend: str | None = None) -> Tensor:
    """Return the sum of every token's rows, accumulated in ``dtype``: rows [rows, d] to [N, d].

    Padding rows are left out. Their gradient is undefined: callers must zero it where the rows are computed.
    """
    return get_backend(BACKENDS, backend or backend_for(rows)).combine(rows, plan, dtype)
