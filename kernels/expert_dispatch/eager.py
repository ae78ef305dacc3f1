"""Dispatch and combination, each of which is the backward pass of the other.

Autograd would add rows one by one into a tensor of zeros. Here every token gathers and sums its own rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.expert_dispatch.permutation import Dispatch


def dispatch(x: Tensor, to: Dispatch, dtype: torch.dtype) -> Tensor:
    """Implement :func:`kernels.expert_dispatch.dispatch`."""
    return _Dispatch.apply(x, to.tokens, to.places, dtype)


def combine(rows: Tensor, to: Dispatch, dtype: torch.dtype) -> Tensor:
    """Implement :func:`kernels.expert_dispatch.combine`."""
    return _Combine.apply(rows, to.tokens, to.places, dtype)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, tokens: Tensor, places: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(places)
        ctx.dtype = x.dtype
        return x.to(dtype).index_select(0, tokens)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (places,) = ctx.saved_tensors
        return _sum_rows(grad, places, ctx.dtype), None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, tokens: Tensor, places: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.dtype = rows.dtype
        return _sum_rows(rows, places, dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (tokens,) = ctx.saved_tensors
        return grad.to(ctx.dtype).index_select(0, tokens), None, None, None


def _sum_rows(rows: Tensor, places: Tensor, dtype: torch.dtype) -> Tensor:
    return rows.index_select(0, places.flatten()).unflatten(0, places.shape).sum(1, dtype=dtype)
