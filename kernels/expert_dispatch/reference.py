"""Dispatch and combination in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.expert_dispatch.permutation import Dispatch


def dispatch(x: Tensor, plan: Dispatch, dtype: torch.dtype) -> Tensor:
    """Implement :func:`kernels.expert_dispatch.dispatch`."""
    return x.to(dtype).index_select(0, plan.row_to_token)


def combine(rows: Tensor, plan: Dispatch, dtype: torch.dtype) -> Tensor:
    """Implement :func:`kernels.expert_dispatch.combine`."""
    return rows.index_select(0, plan.choice_to_row.flatten()).unflatten(0, plan.choice_to_row.shape).sum(1, dtype=dtype)
