"""Packing of cache entries by native operators."""

from __future__ import annotations

from torch import Tensor

from kernels import native
from kernels.autocast import detached
from kernels.cache_io.layout import EntryLayout
from kernels.cache_io.pages import Pages


def pack(x: Tensor, layout: EntryLayout) -> Tensor:
    """Implement :func:`kernels.cache_io.pack` for float32 x."""
    return native.op("pack")(detached(x), layout.spec)


def unpack(packed: Tensor, layout: EntryLayout) -> Tensor:
    """Implement :func:`kernels.cache_io.unpack`."""
    return native.op("unpack")(packed, layout.spec)


def write_ring(ring: Tensor, rows: Tensor, first: Tensor) -> None:
    """Implement :func:`kernels.cache_io.write_ring`."""
    native.op("write_ring")(ring, rows, first)


def write_pages(x: Tensor, layout: EntryLayout, pages: Pages, first: Tensor, last: Tensor) -> None:
    """Implement :func:`kernels.cache_io.write_pages` for float32 x."""
    native.op("write_pages")(pages.storage, pages.page_table, pages.page_size, detached(x), layout.spec, first, last)
