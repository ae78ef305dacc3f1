"""Attention of new tokens over the packed rows of a cache, which are unpacked on the fly."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import native
from kernels.backends import get_backend
from kernels.cache_io import EntryLayout
from kernels.paged_attention import cpu, eager, reference, triton
from kernels.paged_attention.inputs import EntrySet, TokenRows
from kernels.triton_support.platform import can_run

__all__ = ["BACKENDS", "EntrySet", "TokenRows", "backend_for", "paged_attention"]

BACKENDS = {"reference": reference, "eager": eager, "cpu": cpu, "triton": triton}


def backend_for(query: Tensor, layout: EntryLayout, weight_dtype: torch.dtype | None = None) -> str:
    """Return the backend for query, rows of this layout, and the ``weight_dtype`` of :func:`paged_attention`."""
    if can_run(query) and triton.supports(query, layout, weight_dtype):
        return "triton"
    return "cpu" if native.serves(query) else "eager"


def paged_attention(
    query: Tensor,
    tokens: TokenRows | None,
    entries: EntrySet | None,
    sink: Tensor | None,
    layout: EntryLayout,
    window: int = 0,
    scale: float | None = None,
    value_size: int | None = None,
    weight_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """Compute :func:`kernels.sparse_attention.sparse_attention` of new tokens over a cache.

    Memory is bounded: queries are processed in groups.

    Args:
        query: float32 [B, S, H, c], at positions ``tokens.first`` and following. The ``cpu`` backend requires disabled
            gradients.
        tokens: Rows of the window, or None to attend to entries alone. Every query must then have one.
        entries: Entries, or None to attend to the window alone.
        sink: [H], logits; or None.
        layout: Layout of all rows, with ``layout.size == c``.
        window: Tokens that a query attends to, including itself; 0 without ``tokens``.
        scale: Softmax scale, by default ``c ** -0.5``.
        value_size: Values are the first dims of a row, by default all.
        weight_dtype: Dtype of the weights that projected the queries. BF16 products are permitted if these weights have
            16 bits.

    Returns:
        float32 [B, S, H, value_size].
    """
    c = query.shape[-1]
    if sink is None:
        sink = query.new_full(query.shape[2:3], float("-inf"))
    return get_backend(BACKENDS, backend or backend_for(query, layout, weight_dtype)).paged_attention(
        query, tokens, entries, sink, layout, window, c**-0.5 if scale is None else scale, value_size or c
    )
