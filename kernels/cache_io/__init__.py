"""Cache entries in memory: packing, unpacking, and access to rings and pages of packed rows.

:class:`EntryLayout` is the single definition of an entry's bytes. All backends produce the same bits.
"""

from __future__ import annotations

from torch import Tensor

from kernels import native
from kernels.backends import get_backend
from kernels.cache_io import cpu, reference, triton
from kernels.cache_io.layout import FORMAT_BITS, EntryLayout
from kernels.cache_io.pages import Pages
from kernels.triton_support.platform import can_run

__all__ = [
    "BACKENDS",
    "FORMAT_BITS",
    "EntryLayout",
    "Pages",
    "backend_for",
    "pack",
    "unpack",
    "write_pages",
    "write_ring",
]

BACKENDS = {"reference": reference, "cpu": cpu, "triton": triton}


def backend_for(x: Tensor) -> str:
    """Return the backend for x: floats to pack, packed bytes, or a ring."""
    if can_run(x) and (not x.is_floating_point() or x.dtype in triton.DTYPES):
        return "triton"
    runs_natively = native.serves(x) if x.is_floating_point() else x.is_cpu and native.level() is not None
    return "cpu" if runs_natively else "reference"


def pack(x: Tensor, layout: EntryLayout, backend: str | None = None) -> Tensor:
    """Pack entries, float [..., layout.size], into rows, uint8 [..., layout.nbytes]. No gradient.

    The ``cpu`` backend requires float32.
    """
    return get_backend(BACKENDS, backend or backend_for(x)).pack(x, layout)


def unpack(packed: Tensor, layout: EntryLayout, backend: str | None = None) -> Tensor:
    """Unpack rows, uint8 [..., layout.nbytes], into entries, float32 [..., layout.size]."""
    return get_backend(BACKENDS, backend or backend_for(packed)).unpack(packed, layout)


def write_pages(
    x: Tensor, layout: EntryLayout, pages: Pages, first: Tensor, last: Tensor, backend: str | None = None
) -> None:
    """Pack new entries and write them to the pages of every sequence, in place. No gradient.

    Args:
        x: float [B, n, layout.size], float32 for the ``cpu`` backend. A sequence's entries come first in its row, and
            the others are not written.
        layout: Layout of the rows.
        pages: The rows of all sequences. No page to write to is shared.
        first: int64 [B or 1], index of each sequence's first new entry. The pages have a row for it, even if there is
            none.
        last: int64 [B or 1], one past the index of its last new entry, at most ``first + n``.
    """
    get_backend(BACKENDS, backend or backend_for(x)).write_pages(x, layout, pages, first, last)


def write_ring(ring: Tensor, rows: Tensor, first: Tensor, backend: str | None = None) -> None:
    """Write the newest rows of every sequence into its ring buffer, in place.

    Args:
        ring: [B, capacity, width], any dtype. The row of position p is at index ``p % capacity``.
        rows: [B, n, width], the dtype of ``ring``, with n at most the capacity.
        first: int64 [B or 1], position of the first row of each sequence.
    """
    get_backend(BACKENDS, backend or backend_for(ring)).write_ring(ring, rows, first)
