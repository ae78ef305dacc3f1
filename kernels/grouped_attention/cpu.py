"""Grouped-query attention over a cache by a native operator, which unpacks one tile of rows after another."""

from __future__ import annotations

from torch import Tensor

from kernels import native
from kernels.cache_io import EntryLayout, Pages


def grouped_attention(query: Tensor, pages: Pages, visible: Tensor, kv_heads: int, layout: EntryLayout) -> Tensor:
    """Implement :func:`kernels.grouped_attention.grouped_attention` without gradients."""
    return native.op("grouped_attention")(
        query,
        pages.storage,
        pages.page_table,
        pages.page_size,
        visible,
        kv_heads,
        layout.spec,
        query.shape[-1] ** -0.5,
    )
