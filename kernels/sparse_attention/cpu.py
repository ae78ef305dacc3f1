"""Attention over a cache's rows by a native operator."""

from __future__ import annotations

from torch import Tensor

from kernels import native
from kernels.cache_io import EntryLayout
from kernels.sparse_attention.paged import EntrySet, TokenRows


def paged_attention(
    query: Tensor, tokens: TokenRows, entries: EntrySet | None, sink: Tensor, layout: EntryLayout, window: int
) -> Tensor:
    """:func:`kernels.sparse_attention.paged.paged_attention` for float32 queries without gradients."""
    pages = entries.pages if entries is not None else None
    return native.op("packed_attention")(
        query,
        tokens.rows,
        tokens.offsets,
        tokens.first,
        window,
        pages.storage if pages is not None else None,
        pages.numbers if pages is not None else None,
        pages.per_page if pages is not None else 1,
        entries.chosen if entries is not None else None,
        entries.visible if entries is not None else None,
        sink,
        layout.spec,
    )
