"""Grouped-query attention of new tokens over the packed keys and values of a cache."""

from __future__ import annotations

from torch import Tensor

from kernels import native
from kernels.backends import get_backend
from kernels.cache_io import EntryLayout, Pages
from kernels.grouped_attention import cpu, eager, reference

__all__ = ["BACKENDS", "backend_for", "grouped_attention"]

BACKENDS = {"reference": reference, "eager": eager, "cpu": cpu}
_MAX_NATIVE_TOKENS = 8
"""With more new tokens, matrix products make up for the unpacked copy of the rows."""


def backend_for(query: Tensor) -> str:
    """Return the backend for query [B, S, H, c]: ``cpu`` for few new tokens, else ``eager``."""
    return "cpu" if query.shape[1] <= _MAX_NATIVE_TOKENS and native.serves(query) else "eager"


def grouped_attention(
    query: Tensor, pages: Pages, visible: Tensor, kv_heads: int, layout: EntryLayout, backend: str | None = None
) -> Tensor:
    """Attend to the keys and values of the first tokens of every sequence, with softmax scale ``c ** -0.5``.

    Args:
        query: float32 [B, S, H, c]. The ``cpu`` backend requires disabled gradients.
        pages: Rows of all sequences. A row holds a key of c dims and a value of c dims for each key-value head.
        visible: int64 [B or 1, S], at least 1 and not decreasing in S: every query attends to this many rows, the
            first ones.
        kv_heads: Number of key-value heads, a divisor of H. ``H // kv_heads`` neighboring heads share one.
        layout: Layout of the rows, with ``layout.size == kv_heads * 2 * c``.

    Returns:
        float32 [B, S, H, c].
    """
    return get_backend(BACKENDS, backend or backend_for(query)).grouped_attention(
        query, pages, visible, kv_heads, layout
    )
