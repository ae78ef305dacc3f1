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
    count = rows.shape[1]
    native.op("write_ring")(ring, rows, [position + count for position in per_sequence(first, len(ring))])


def write_pages(x: Tensor, layout: EntryLayout, pages: Pages, first: Tensor, last: Tensor) -> None:
    """Implement :func:`kernels.cache_io.write_pages` for float32 x."""
    counts = (per_sequence(numbers, len(x)) for numbers in (first, last))
    native.op("write_pages")(pages.storage, pages.page_table, pages.page_size, detached(x), layout.spec, *counts)


def per_sequence(numbers: Tensor, sequences: int) -> list[int]:
    """Return int64 [sequences or 1] as a list with a number for every sequence."""
    found = numbers.tolist()
    return found * sequences if len(found) == 1 else found
