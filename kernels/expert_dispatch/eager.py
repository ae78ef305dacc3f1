"""Dispatch and combination, each of which is the backward pass of the other.

Autograd would add rows one by one into a tensor of zeros. Here every token gathers and sums its own rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.expert_dispatch.permutation import Dispatch
from kernels.linear import linear
from kernels.swiglu import swiglu


def dispatch(x: Tensor, plan: Dispatch, dtype: torch.dtype) -> Tensor:
    """Implement :func:`kernels.expert_dispatch.dispatch`."""
    return _Dispatch.apply(x, plan.row_to_token, plan.choice_to_row, dtype)


def run_experts(rows: Tensor, gains: Tensor, stacks: tuple[Tensor, ...], plan: Dispatch, limit: float) -> Tensor:
    """Implement :func:`kernels.expert_dispatch.run_experts`."""
    counts = plan.counts.tolist()
    # Unbinding gives each stack one gradient instead of one per expert.
    experts = zip(rows.split(counts), gains.split(counts), zip(*(w.unbind() for w in stacks)))
    return torch.cat([run_expert(own, gain, expert, limit) for own, gain, expert in experts])


def run_expert(rows: Tensor, gain: Tensor, expert: tuple[Tensor, ...], limit: float) -> Tensor:
    """Run one expert, w1 and w3 [inner, d] and w2 [d, inner], over rows [n, d] with weights ``gain`` [n, 1]."""
    w1, w3, w2 = expert
    return linear(swiglu(linear(rows, w1), linear(rows, w3), limit, gain), w2)


def combine(rows: Tensor, plan: Dispatch, dtype: torch.dtype) -> Tensor:
    """Implement :func:`kernels.expert_dispatch.combine`."""
    return _Combine.apply(rows, plan.row_to_token, plan.choice_to_row, dtype)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, row_to_token: Tensor, choice_to_row: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(choice_to_row)
        ctx.dtype = x.dtype
        return x.to(dtype).index_select(0, row_to_token)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (choice_to_row,) = ctx.saved_tensors
        return _sum_rows(grad, choice_to_row, ctx.dtype), None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, row_to_token: Tensor, choice_to_row: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(row_to_token)
        ctx.dtype = rows.dtype
        return _sum_rows(rows, choice_to_row, dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (row_to_token,) = ctx.saved_tensors
        return grad.to(ctx.dtype).index_select(0, row_to_token), None, None, None


def _sum_rows(rows: Tensor, choice_to_row: Tensor, dtype: torch.dtype) -> Tensor:
    return rows.index_select(0, choice_to_row.flatten()).unflatten(0, choice_to_row.shape).sum(1, dtype=dtype)
