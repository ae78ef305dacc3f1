"""Attention over a sliding window, compressed entries and a sink, in one softmax.

Whole sequences run in blocks on a CPU (``blocked.py``), elsewhere as written in ``reference.py``; a cache's rows as in
``packed.py``. ``backend=`` chooses by hand and :func:`backend_for` tells which one runs.
"""

from __future__ import annotations

from torch import Tensor

from kernels.sparse_attention import blocked, reference
from kernels.sparse_attention.packed import INVARIANT_TILE, TiledAttention, packed_attention, token_attention

BACKENDS = {"reference": reference, "blocked": blocked}


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


__all__ = [
    "BACKENDS",
    "INVARIANT_TILE",
    "TiledAttention",
    "backend_for",
    "packed_attention",
    "sparse_attention",
    "token_attention",
]
