"""Index scores by blocks of queries, of all keys or of chosen ones.

The products of every head stay in the cache and are recomputed in the backward pass: memory does not grow with
heads * S * T, as that of the autograd graph would. On a CPU, keys after the last one that a query of a block may see
are skipped. Chosen keys are gathered if that takes less time than the scores of all keys.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.autocast import in_float32
from kernels.chosen_rows import GATHER_COST, ChosenRows

_MAX_PRODUCTS, _MAX_PRODUCTS_ON_GPU = 1 << 18, 1 << 26
"""Maximum number of products per block of several queries, over all heads."""


def index_scores(
    query: Tensor, keys: Tensor, head_weights: Tensor, permitted: Tensor | None = None, chosen: Tensor | None = None
) -> Tensor:
    """Implement :func:`kernels.index_scores.index_scores`."""
    with in_float32(query):
        return _Scores.apply(query, keys, head_weights, permitted, chosen)


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, keys, head_weights, permitted, chosen):
        ctx.save_for_backward(query, keys, head_weights, permitted, chosen)
        return scores_of(query, keys, head_weights, permitted, chosen)

    @staticmethod
    def backward(ctx, upstream):
        gradients = score_gradients(upstream, *ctx.saved_tensors)
        return *(g.to(x.dtype) for g, x in zip(gradients, ctx.saved_tensors)), None, None


def scores_of(
    query: Tensor, keys: Tensor, head_weights: Tensor, permitted: Tensor | None, chosen: Tensor | None
) -> Tensor:
    """Return the scores, float32 [B, S, T or K], without a graph."""
    if chosen is not None and gathers(keys, chosen, query.shape[2]):
        return _chosen_scores(query, keys, head_weights, chosen)
    wide = keys.float()
    scores = wide.new_zeros(*query.shape[:2], wide.shape[1])
    for rows, T in _blocks(query, keys, None if chosen is not None else permitted):
        products = _products(query[:, rows], wide[:, :T])
        scores[:, rows, :T] = (head_weights[:, rows].float().unsqueeze(2) @ products).squeeze(2)
    return scores if chosen is None else scores.gather(-1, chosen.clamp(min=0).long())


def score_gradients(
    upstream: Tensor,
    query: Tensor,
    keys: Tensor,
    head_weights: Tensor,
    permitted: Tensor | None,
    chosen: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, keys and head weights, float32. ``upstream`` is that of the scores."""
    if chosen is not None and gathers(keys, chosen, query.shape[2]):
        return _chosen_gradients(query, keys, head_weights, chosen, upstream)
    if chosen is not None:
        whole = upstream.new_zeros(*query.shape[:2], keys.shape[1])
        upstream, permitted = whole.scatter_add_(-1, chosen.clamp(min=0).long(), upstream), None
    wide = keys.float()
    grad_query, grad_weights, grad_keys = (
        torch.zeros_like(x, dtype=torch.float32) for x in (query, head_weights, wide)
    )
    for rows, T in _blocks(query, keys, permitted):
        some_keys, own = wide[:, :T], upstream[:, rows, :T]
        products = _products(query[:, rows], some_keys)
        grad_weights[:, rows] = (products @ own.unsqueeze(-1)).squeeze(-1)
        flat = _grad_products(products, head_weights[:, rows], own).flatten(1, 2)
        grad_query[:, rows] = torch.bmm(flat, some_keys).unflatten(1, (-1, query.shape[2]))
        grad_keys[:, :T] += torch.bmm(flat.transpose(1, 2), query[:, rows].float().flatten(1, 2))
    return grad_query, grad_keys, grad_weights


def gathers(keys: Tensor, chosen: Tensor, heads: int) -> bool:
    """Return whether to gather the chosen keys instead of scoring all of them."""
    return chosen.shape[-1] * (heads + GATHER_COST) < keys.shape[1] * heads


def _blocks(query: Tensor, keys: Tensor, permitted: Tensor | None) -> Iterator[tuple[slice, int]]:
    """Yield blocks of queries, with the number of leading keys that they need."""
    B, S, h, _ = query.shape
    T = keys.shape[1]
    step = max(1, (_MAX_PRODUCTS if query.is_cpu else _MAX_PRODUCTS_ON_GPU) // max(1, B * h * T))
    needed = [T] * S
    if permitted is not None and T and query.is_cpu:
        needed = (permitted.any(0) * torch.arange(1, T + 1)).amax(-1).tolist()
    for begin in range(0, S, step):
        yield slice(begin, begin + step), max(needed[begin : begin + step])


def _chosen_scores(query: Tensor, keys: Tensor, head_weights: Tensor, chosen: Tensor) -> Tensor:
    selection, wide = ChosenRows(keys, chosen), keys.float()
    queries, weights = (x.flatten(0, 1).float().unsqueeze(1) for x in (query, head_weights))
    pieces = []
    for block in selection.blocks():
        products = _products(queries[block], selection.gather(wide, block))
        pieces.append((weights[block].unsqueeze(2) @ products).flatten(1))
    return torch.cat(pieces).view(chosen.shape)


def _chosen_gradients(
    query: Tensor, keys: Tensor, head_weights: Tensor, chosen: Tensor, upstream: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    selection, wide = ChosenRows(keys, chosen), keys.float()
    queries, weights, flat_upstream = (x.flatten(0, 1).float().unsqueeze(1) for x in (query, head_weights, upstream))
    grad_queries, grad_weights, grad_keys = [], [], wide.new_zeros(wide.shape)
    for block in selection.blocks():
        some_keys = selection.gather(wide, block)
        products = _products(queries[block], some_keys)
        grad_weights.append((products @ flat_upstream[block].unsqueeze(-1)).flatten(1))
        flat = _grad_products(products, weights[block], flat_upstream[block]).flatten(1, 2)
        grad_queries.append(torch.bmm(flat, some_keys))
        selection.add(grad_keys, block, torch.bmm(flat.transpose(1, 2), queries[block].flatten(1, 2)))
    return torch.cat(grad_queries).view(query.shape), grad_keys, torch.cat(grad_weights).view_as(head_weights)


def _grad_products(products: Tensor, head_weights: Tensor, upstream: Tensor) -> Tensor:
    """Return the gradient of products [B, s, h, T] before relu. head_weights [B, s, h], upstream [B, s, T]."""
    per_head = head_weights.float().unsqueeze(-1) * upstream.unsqueeze(2)
    return torch.ops.aten.threshold_backward(per_head, products, 0)


def _products(query: Tensor, keys: Tensor) -> Tensor:
    """Return the products of every head after relu, float32 [B, s, h, T]."""
    flat = torch.bmm(query.float().flatten(1, 2), keys.transpose(1, 2))
    return flat.relu_().unflatten(1, query.shape[1:3])
