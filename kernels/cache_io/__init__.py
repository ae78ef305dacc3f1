"""Cache entries to bytes and back: the one definition of what an entry looks like in memory.

Native on a CPU without gradients (``cpu.cpp``), as written in ``reference.py`` elsewhere. ``backend=`` forces one.
"""

from __future__ import annotations

from torch import Tensor

from kernels import native
from kernels.cache_io import cpu, reference
from kernels.cache_io.paged import PagedRows, Pages
from kernels.cache_io.reference import EntryLayout

BACKENDS = {"reference": reference, "cpu": cpu}


def pack(x: Tensor, layout: EntryLayout, backend: str | None = None) -> Tensor:
    """See :func:`kernels.cache_io.reference.pack`."""
    return BACKENDS[backend or ("cpu" if native.serves(x) else "reference")].pack(x, layout)


def unpack(packed: Tensor, layout: EntryLayout, backend: str | None = None) -> Tensor:
    """See :func:`kernels.cache_io.reference.unpack`."""
    runs = "cpu" if packed.is_cpu and native.level() is not None else "reference"
    return BACKENDS[backend or runs].unpack(packed, layout)


def write_ring(ring: Tensor, rows: Tensor, ends: list[int], backend: str | None = None) -> None:
    """See :func:`kernels.cache_io.reference.write_ring`."""
    runs = "cpu" if ring.is_cpu and native.level() is not None else "reference"
    BACKENDS[backend or runs].write_ring(ring, rows, ends)


__all__ = ["BACKENDS", "EntryLayout", "PagedRows", "Pages", "pack", "unpack", "write_ring"]
