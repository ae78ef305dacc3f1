"""Index scores for CPUs, where a whole sequence is trained on: the reference's numbers, a block of queries at a time.

What every head gives every pair of query and key stays in the cache and is made again in the backward pass: memory does
not grow with heads * S * T, as it does in what autograd would record. Entries that causality hides from a whole block
are left out.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.autocast import in_float32

_PRODUCTS = 1 << 18
"""Products of heads that a block makes at most, unless a single query makes more."""


def index_scores(query: Tensor, keys: Tensor, head_weights: Tensor, permitted: Tensor | None = None) -> Tensor:
    """:func:`kernels.index_topk.reference.index_scores`."""
    with in_float32(query):
        return _Scores.apply(query, keys, head_weights, permitted)


def _blocks(query: Tensor, keys: Tensor, permitted: Tensor | None) -> Iterator[tuple[slice, int]]:
    """Rows of queries, and how many keys, the first ones, they need."""
    B, S, h, _ = query.shape
    T = keys.shape[1]
    step = max(1, _PRODUCTS // max(1, B * h * T))
    needed = [T] * S
    if permitted is not None and T:
        needed = (permitted.any(0) * torch.arange(1, T + 1)).amax(-1).tolist()
    for begin in range(0, S, step):
        yield slice(begin, begin + step), max(needed[begin : begin + step])


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, keys, head_weights, permitted):
        ctx.save_for_backward(query, keys, head_weights, permitted)
        keys = keys.float()
        scores = keys.new_zeros(*query.shape[:2], keys.shape[1])
        for rows, T in _blocks(query, keys, permitted):
            products = _products(query[:, rows], keys[:, :T])
            scores[:, rows, :T] = (head_weights[:, rows].float().unsqueeze(2) @ products).squeeze(2)
        return scores

    @staticmethod
    def backward(ctx, grad):
        query, keys, head_weights, permitted = ctx.saved_tensors
        wide = keys.float()
        grad_query, grad_weights, grad_keys = map(torch.zeros_like, (query, head_weights, wide))
        for rows, T in _blocks(query, keys, permitted):
            near, upstream = wide[:, :T], grad[:, rows, :T]
            products = _products(query[:, rows], near)
            grad_weights[:, rows] = (products @ upstream.unsqueeze(-1)).squeeze(-1)
            each = head_weights[:, rows].float().unsqueeze(-1) * upstream.unsqueeze(2)
            flat = torch.ops.aten.threshold_backward(each, products, 0).flatten(1, 2)  # what relu let through
            grad_query[:, rows] = torch.bmm(flat, near).unflatten(1, (-1, query.shape[2]))
            grad_keys[:, :T] += torch.bmm(flat.transpose(1, 2), query[:, rows].float().flatten(1, 2))
        return grad_query, grad_keys.to(keys.dtype), grad_weights, None


def _products(query: Tensor, keys: Tensor) -> Tensor:
    """relu of each head's products, float32 [B, s, h, T]."""
    flat = torch.bmm(query.float().flatten(1, 2), keys.transpose(1, 2))
    return flat.relu_().unflatten(1, query.shape[1:3])
