"""Packing by native operators."""

from __future__ import annotations

from torch import Tensor

from kernels import native
from kernels.autocast import detached
from kernels.cache_io.reference import EntryLayout


def pack(x: Tensor, layout: EntryLayout) -> Tensor:
    """:func:`kernels.cache_io.reference.pack` for float32 x."""
    return native.op("pack")(detached(x), layout.spec)


def unpack(packed: Tensor, layout: EntryLayout) -> Tensor:
    """:func:`kernels.cache_io.reference.unpack`."""
    return native.op("unpack")(packed, layout.spec)


def write_ring(ring: Tensor, rows: Tensor, ends: list[int]) -> None:
    """:func:`kernels.cache_io.reference.write_ring`."""
    native.op("write_ring")(ring, rows, ends)
