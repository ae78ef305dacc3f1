"""Attention within whole sequences to entries chosen per query, by blocks of queries: the ``eager`` backend without a
window.

The chosen entries of a block are gathered while they fit into the cache, again in the backward pass. Neither time nor
memory grows with the number of entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.autocast import in_float32, product_dtype
from kernels.chosen_rows import ChosenRows
from kernels.sparse_attention import blocks


def sparse_attention(
    query: Tensor, entries: Tensor, chosen: Tensor, sink: Tensor, scale: float, value_size: int
) -> tuple[Tensor, Tensor]:
    """Implement :func:`kernels.sparse_attention.sparse_attention` for ``chosen`` entries without a window.

    Under autocast only the products have its dtype.
    """
    dtype = product_dtype(query) if torch.is_autocast_enabled(query.device.type) else torch.float32
    with in_float32(query):
        return _Attention.apply(query, entries, sink, chosen, dtype, scale, value_size)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, entries, sink, chosen, dtype, scale, value_size):
        ctx.scale, ctx.dtypes = scale, (query.dtype, entries.dtype)
        scaled = (query * (scale * blocks.LOG2_E)).to(dtype)
        rows, sink = entries.to(dtype), sink * blocks.LOG2_E
        out = query.new_empty(*query.shape[:3], value_size, dtype=torch.float32)
        log_sum = query.new_empty(query.shape[:3], dtype=torch.float32)
        mass = query.new_empty(chosen.shape, dtype=torch.float32)
        selection = ChosenRows(rows, chosen)
        by_query = [x.flatten(0, 1) for x in (scaled, out, log_sum, mass)]
        for block in selection.blocks():
            queries, some_out, some_sums, some_mass = (x[block].unsqueeze(1) for x in by_query)
            keys, bias = selection.gather(rows, block), _bias(selection, block)
            result, weights, total, log = blocks.attend(queries, keys, bias, sink, value_size)
            some_out.copy_(result), some_sums.copy_(log), some_mass.copy_(blocks.mass(weights, total))
        ctx.save_for_backward(scaled, rows, sink, chosen, out.to(dtype), log_sum)
        ctx.mark_non_differentiable(mass)
        return out, mass

    @staticmethod
    def backward(ctx, grad_out, _):
        scaled, rows, sink, chosen, out, log_sum = ctx.saved_tensors
        inner = (grad_out * out).sum(-1)
        grad_sink = -((sink - log_sum).exp2() * inner).sum((0, 1))
        grad_query = scaled.new_empty(scaled.shape, dtype=torch.float32)  # contiguous, for views
        grad_entries = rows.new_zeros(rows.shape, dtype=torch.float32)
        selection = ChosenRows(rows, chosen)
        by_query = [x.flatten(0, 1) for x in (scaled, log_sum, grad_out.to(rows.dtype), inner, grad_query)]
        for block in selection.blocks():
            queries, *sums, some_grad = (x[block].unsqueeze(1) for x in by_query)
            keys, bias = selection.gather(rows, block), _bias(selection, block)
            result, grad_keys = blocks.gradients(queries, keys, bias, *sums)
            some_grad.copy_(result)
            selection.add(grad_entries, block, grad_keys)
        grad_query *= ctx.scale
        query_dtype, entries_dtype = ctx.dtypes
        return grad_query.to(query_dtype), grad_entries.to(entries_dtype), grad_sink, *[None] * 4


def _bias(selection: ChosenRows, block: slice) -> Tensor:
    """Return the additive mask of unused slots, 0 or -inf: float32 [queries, 1, 1, K]."""
    unused = selection.unused[block]
    return torch.zeros(unused.shape, device=unused.device).masked_fill_(unused, float("-inf")).unflatten(0, (-1, 1, 1))
