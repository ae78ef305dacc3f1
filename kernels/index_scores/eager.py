"""Index scores by blocks of queries: of all keys on CPUs, of chosen keys on any device.

The products of every head stay in the cache and are recomputed in the backward pass: memory does not grow with
heads * S * T, as that of the autograd graph would. Keys after the last one that a query of a block may see are skipped.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.autocast import in_float32
from kernels.chosen_rows import ChosenRows

_PRODUCTS = 1 << 18
"""Most products of a block of several queries, over all heads."""


def index_scores(
    query: Tensor, keys: Tensor, head_weights: Tensor, permitted: Tensor | None = None, chosen: Tensor | None = None
) -> Tensor:
    """Implement :func:`kernels.index_scores.index_scores`."""
    with in_float32(query):
        if chosen is not None:
            return _ChosenScores.apply(query, keys, head_weights, chosen)
        return _Scores.apply(query, keys, head_weights, permitted)


def _blocks(query: Tensor, keys: Tensor, permitted: Tensor | None) -> Iterator[tuple[slice, int]]:
    """Yield blocks of queries, with the number of leading keys that they need."""
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
            some_keys, upstream = wide[:, :T], grad[:, rows, :T]
            products = _products(query[:, rows], some_keys)
            grad_weights[:, rows] = (products @ upstream.unsqueeze(-1)).squeeze(-1)
            flat = _grad_products(products, head_weights[:, rows], upstream).flatten(1, 2)
            grad_query[:, rows] = torch.bmm(flat, some_keys).unflatten(1, (-1, query.shape[2]))
            grad_keys[:, :T] += torch.bmm(flat.transpose(1, 2), query[:, rows].float().flatten(1, 2))
        return grad_query, grad_keys.to(keys.dtype), grad_weights, None


class _ChosenScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, keys, head_weights, chosen):
        ctx.save_for_backward(query, keys, head_weights, chosen)
        selection, wide = ChosenRows(keys, chosen), keys.float()
        queries, weights = (x.flatten(0, 1).float().unsqueeze(1) for x in (query, head_weights))
        pieces = []
        for block in selection.blocks():
            products = _products(queries[block], selection.gather(wide, block))
            pieces.append((weights[block].unsqueeze(2) @ products).flatten(1))
        return torch.cat(pieces).view(chosen.shape)

    @staticmethod
    def backward(ctx, grad):
        query, keys, head_weights, chosen = ctx.saved_tensors
        selection, wide = ChosenRows(keys, chosen), keys.float()
        queries, weights, upstream = (x.flatten(0, 1).float().unsqueeze(1) for x in (query, head_weights, grad))
        grad_queries, grad_weights, grad_keys = [], [], wide.new_zeros(wide.shape)
        for block in selection.blocks():
            some_keys = selection.gather(wide, block)
            products = _products(queries[block], some_keys)
            grad_weights.append((products @ upstream[block].unsqueeze(-1)).flatten(1))
            flat = _grad_products(products, weights[block], upstream[block]).flatten(1, 2)
            grad_queries.append(torch.bmm(flat, some_keys))
            selection.add(grad_keys, block, torch.bmm(flat.transpose(1, 2), queries[block].flatten(1, 2)))
        grad_query, grad_weight = torch.cat(grad_queries).view(query.shape), torch.cat(grad_weights)
        return grad_query.to(query.dtype), grad_keys.to(keys.dtype), grad_weight.view_as(head_weights), None


def _grad_products(products: Tensor, head_weights: Tensor, upstream: Tensor) -> Tensor:
    """Return the gradient of products [B, s, h, T] before relu. head_weights [B, s, h], upstream [B, s, T]."""
    per_head = head_weights.float().unsqueeze(-1) * upstream.unsqueeze(2)
    return torch.ops.aten.threshold_backward(per_head, products, 0)


def _products(query: Tensor, keys: Tensor) -> Tensor:
    """Return the products of every head after relu, float32 [B, s, h, T]."""
    flat = torch.bmm(query.float().flatten(1, 2), keys.transpose(1, 2))
    return flat.relu_().unflatten(1, query.shape[1:3])
