"""Dispatch and combination in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.expert_dispatch.permutation import Dispatch
from kernels.linear.reference import linear
from kernels.swiglu.reference import swiglu


def dispatch(x: Tensor, plan: Dispatch, dtype: torch.dtype) -> Tensor:
    """Implement :func:`kernels.expert_dispatch.dispatch`."""
    return x.to(dtype).index_select(0, plan.row_to_token)


def run_experts(rows: Tensor, gains: Tensor, stacks: tuple[Tensor, ...], plan: Dispatch, limit: float) -> Tensor:
    """Implement :func:`kernels.expert_dispatch.run_experts`."""
    outputs, end = [], 0
    for expert, count in enumerate(plan.counts.tolist()):
        own, end = slice(end, end + count), end + count
        w1, w3, w2 = (w[expert] for w in stacks)
        outputs.append(linear(swiglu(linear(rows[own], w1), linear(rows[own], w3), limit, gains[own]), w2))
    return torch.cat(outputs)


def combine(rows: Tensor, plan: Dispatch, dtype: torch.dtype) -> Tensor:
    """Implement :func:`kernels.expert_dispatch.combine`."""
    return rows.index_select(0, plan.choice_to_row.flatten()).unflatten(0, plan.choice_to_row.shape).sum(1, dtype=dtype)
