"""Movement of tokens to the experts that they are routed to, the experts, and combination of their outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.backends import get_backend
from kernels.expert_dispatch import eager, reference, triton
from kernels.expert_dispatch.eager import run_expert
from kernels.expert_dispatch.permutation import Dispatch, by_expert
from kernels.triton_support.platform import can_run

__all__ = ["BACKENDS", "Dispatch", "backend_for", "by_expert", "combine", "dispatch", "run_expert", "run_experts"]

BACKENDS = {"reference": reference, "eager": eager, "triton": triton}


def backend_for(x: Tensor) -> str:
    """Return the backend for tokens or rows. ``triton`` differs from ``eager`` in :func:`run_experts` only."""
    return "triton" if can_run(x) and triton.supports(x) else "eager"


def dispatch(x: Tensor, plan: Dispatch, dtype: torch.dtype, backend: str | None = None) -> Tensor:
    """Return the token of every row, in ``dtype``: x [N, d] to [rows, d].

    Padding rows hold the first token. Callers must give them no weight: the ``eager`` backend passes no gradient
    through them.
    """
    return get_backend(BACKENDS, backend or backend_for(x)).dispatch(x, plan, dtype)


def run_experts(
    rows: Tensor,
    gains: Tensor,
    stacks: tuple[Tensor, ...],
    plan: Dispatch,
    limit: float,
    backend: str | None = None,
) -> Tensor:
    """Run every expert, a SwiGLU, over its own rows.

    Args:
        rows: [rows, d], grouped by expert, in the dtype of the products.
        gains: [rows, 1], the weight of each row.
        stacks: w1 and w3 [experts, inner, d] and w2 [experts, d, inner]. Autocast applies to them.
        plan: The grouping.
        limit: Clamping bound of the SwiGLU.

    Returns:
        [rows, d], weighted. The ``triton`` backend multiplies the rows of all experts in one launch per stack, without
        padding, and does not synchronize. The others run one expert after another.
    """
    return get_backend(BACKENDS, backend or backend_for(rows)).run_experts(rows, gains, stacks, plan, limit)


def combine(rows: Tensor, plan: Dispatch, dtype: torch.dtype, backend: str | None = None) -> Tensor:
    """Return the sum of every token's rows, accumulated in ``dtype``: rows [rows, d] to [N, d].

    Padding rows are left out. Their gradient is undefined: callers must zero it where the rows are computed.
    """
    return get_backend(BACKENDS, backend or backend_for(rows)).combine(rows, plan, dtype)
