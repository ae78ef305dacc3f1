"""Index scores for CPUs, where a whole sequence is trained on: the reference's numbers, a block of queries at a time.

What every head gives every pair of query and key stays in the cache and is made again in the backward pass: memory does
not grow with heads * S * T, as it does in what autograd would record.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_PRODUCTS = 1 << 18
"""Products of heads that a block makes at most, unless a single query makes more."""


def index_scores(query: Tensor, keys: Tensor, head_weights: Tensor) -> Tensor:
    """:func:`kernels.index_topk.reference.index_scores`. Under autocast products are in its type, everything else in
    float32."""
    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype
    with torch.autocast(device, enabled=False):
        return _Scores.apply(query, keys, head_weights, dtype)


def _blocks(query: Tensor, keys: Tensor) -> Iterator[slice]:
    B, S, h, _ = query.shape
    step = max(1, _PRODUCTS // max(1, B * h * keys.shape[1]))
    return (slice(begin, begin + step) for begin in range(0, S, step))


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, keys, head_weights, dtype):
        ctx.save_for_backward(query, keys, head_weights)
        ctx.dtype = dtype
        across = keys.to(dtype).transpose(1, 2)
        scores = query.new_empty(*query.shape[:2], keys.shape[1], dtype=torch.float32)
        for rows in _blocks(query, keys):
            scores[:, rows] = _weighted(_products(query[:, rows], across).relu_(), head_weights[:, rows])
        return scores

    @staticmethod
    def backward(ctx, grad):
        query, keys, head_weights = ctx.saved_tensors
        narrow = keys.to(ctx.dtype)
        grad_query, grad_weights = torch.empty_like(query), torch.empty_like(head_weights)
        grad_keys = torch.zeros_like(keys, dtype=torch.float32)
        for rows in _blocks(query, keys):
            products = _products(query[:, rows], narrow.transpose(1, 2)).relu_()
            upstream = grad[:, rows].to(products.dtype)
            grad_weights[:, rows] = (products @ upstream.unsqueeze(-1)).squeeze(-1)
            # What relu let through, times its weight.
            each = head_weights[:, rows].to(products.dtype).unsqueeze(-1) * upstream.unsqueeze(2)
            flat = torch.where(products > 0, each, 0.0).to(ctx.dtype).flatten(1, 2)
            grad_query[:, rows] = torch.bmm(flat, narrow).unflatten(1, (-1, query.shape[2]))
            grad_keys += torch.bmm(flat.transpose(1, 2), query[:, rows].to(ctx.dtype).flatten(1, 2))
        return grad_query, grad_keys.to(keys.dtype), grad_weights, None


def _products(query: Tensor, across: Tensor) -> Tensor:
    """[B, s, h, T], at least float32."""
    flat = torch.bmm(query.to(across.dtype).flatten(1, 2), across).unflatten(1, query.shape[1:3])
    return flat.float() if flat.dtype.itemsize < 4 else flat


def _weighted(products: Tensor, weights: Tensor) -> Tensor:
    """The sum over heads: [B, s, h, T] and [B, s, h] -> [B, s, T]."""
    return (weights.to(products.dtype).unsqueeze(2) @ products).squeeze(2)
