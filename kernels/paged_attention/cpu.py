"""Attention over the rows of a cache by a native operator."""

from __future__ import annotations

from torch import Tensor

from kernels import native
from kernels.cache_io import EntryLayout
from kernels.paged_attention.inputs import EntrySet, TokenRows


def paged_attention(
    query: Tensor,
    tokens: TokenRows | None,
    entries: EntrySet | None,
    sink: Tensor,
    layout: EntryLayout,
    window: int,
    scale: float,
    value_size: int,
) -> Tensor:
    """Implement :func:`kernels.paged_attention.paged_attention` without gradients."""
    pages = entries.pages if entries is not None else None
    return native.op("paged_attention")(
        query,
        tokens.rows if tokens is not None else None,
        tokens.offsets if tokens is not None else None,
        tokens.first if tokens is not None else None,
        window,
        pages.storage if pages is not None else None,
        pages.page_table if pages is not None else None,
        pages.page_size if pages is not None else 1,
        entries.chosen if entries is not None else None,
        entries.visible if entries is not None else None,
        sink,
        layout.spec,
        scale,
        value_size,
    )
