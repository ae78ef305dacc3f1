"""Attention over a sliding window, compressed entries and a sink, in one softmax.

Whole sequences run in blocks on a CPU (``blocked.py``), elsewhere as written in ``reference.py``. Over a cache's rows a
native operator runs on a CPU (``cpu.cpp``), and ``paged.py`` elsewhere. ``backend=`` forces one; :func:`backend_for`
and :func:`paged_backend_for` tell which one runs.
"""

from __future__ import annotations

from torch import Tensor

from kernels import native
from kernels.cache_io import EntryLayout
from kernels.sparse_attention import blocked, cpu, paged, reference
from kernels.sparse_attention.paged import EntrySet, TokenRows
from kernels.sparse_attention.tiled import INVARIANT_TILE, TiledAttention

BACKENDS = {"reference": reference, "blocked": blocked}
PAGED_BACKENDS = {"paged": paged, "cpu": cpu}


def backend_for(query: Tensor, window_kv: Tensor, entries: Tensor | None) -> str:
    whole = window_kv.shape[1] == query.shape[1] and (entries is None or entries.dim() == 3)
    return "blocked" if whole and query.device.type == "cpu" and query.dtype.itemsize <= 4 else "reference"


def sparse_attention(
    query: Tensor,
    window_kv: Tensor,
    entries: Tensor | None,
    entry_mask: Tensor | None,
    sink: Tensor,
    window: int,
    reach: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """See :func:`kernels.sparse_attention.reference.sparse_attention`."""
    chosen = backend or backend_for(query, window_kv, entries)
    return BACKENDS[chosen].sparse_attention(query, window_kv, entries, entry_mask, sink, window, reach)


def paged_backend_for(query: Tensor) -> str:
    return "cpu" if native.serves(query) else "paged"


def paged_attention(
    query: Tensor,
    tokens: TokenRows,
    entries: EntrySet | None,
    sink: Tensor,
    layout: EntryLayout,
    window: int,
    backend: str | None = None,
) -> Tensor:
    """See :func:`kernels.sparse_attention.paged.paged_attention`."""
    chosen = PAGED_BACKENDS[backend or paged_backend_for(query)]
    return chosen.paged_attention(query, tokens, entries, sink, layout, window)


__all__ = [
    "BACKENDS",
    "INVARIANT_TILE",
    "PAGED_BACKENDS",
    "EntrySet",
    "TiledAttention",
    "TokenRows",
    "backend_for",
    "paged_attention",
    "paged_backend_for",
    "sparse_attention",
]
