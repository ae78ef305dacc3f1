"""Dispatch and combination in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.expert_dispatch.permutation import Dispatch


def dispatch(x: Tensor, to: Dispatch, dtype: torch.dtype) -> Tensor:
    """Implement :func:`kernels.expert_dispatch.dispatch`."""
    return x.to(dtype).index_select(0, to.tokens)


def combine(rows: Tensor, to: Dispatch, dtype: torch.dtype) -> Tensor:
    """Implement :func:`kernels.expert_dispatch.combine`."""
    return rows.index_select(0, to.places.flatten()).unflatten(0, to.places.shape).sum(1, dtype=dtype)
