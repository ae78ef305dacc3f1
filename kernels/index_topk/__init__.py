"""Selection of compressed entries by the lightning indexer (report eq. 17): :func:`index_topk` among the packed keys of
a cache, :func:`select_entries` within whole sequences."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import native
from kernels.backends import get_backend
from kernels.cache_io import EntryLayout, Pages
from kernels.entry_ranges import EntryRanges
from kernels.index_topk import cpu, eager, reference, triton
from kernels.index_topk.selection import select_topk
from kernels.triton_support.platform import can_run

__all__ = ["BACKENDS", "backend_for", "backend_for_sequences", "index_topk", "select_entries", "select_topk"]

BACKENDS = {"reference": reference, "eager": eager, "cpu": cpu, "triton": triton}


def backend_for(query: Tensor, layout: EntryLayout, k: int) -> str:
    """Return the backend for query, keys of this layout, and k."""
    if can_run(query) and triton.supports(query, layout, k):
        return "triton"
    return "cpu" if query.is_cpu and native.level() is not None else "eager"


def backend_for_sequences(query: Tensor, k: int) -> str:
    """Return the backend of :func:`select_entries`."""
    return "triton" if can_run(query) and triton.supports_sequences(query, k) else "eager"


def index_topk(
    query: Tensor,
    keys: Pages,
    layout: EntryLayout,
    head_weights: Tensor,
    visible: Tensor,
    k: int,
    dtype: torch.dtype = torch.float32,
    batch_invariant: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Select the ``k`` entries of a cache with the best :func:`kernels.index_scores.index_scores`. No gradient.

    Apart from the result, memory does not grow with S. With the number of entries it grows by one row of scores.

    Args:
        query: float32 [B, S, h, c], already rounded to the format of the keys.
        keys: Packed index keys.
        layout: Layout of the keys, with ``layout.size == c``.
        head_weights: [B, S, h], already scaled.
        visible: int64 [B or 1, S]: every query selects among this many entries, the first ones.
        k: Entries to select.
        dtype: Scores are rounded to this dtype before they are compared.
        batch_invariant: Compute every score independently of the other queries and of the number of entries, bit for
            bit. The ``cpu`` and ``triton`` backends always do; ``reference`` does not support it.

    Returns:
        int64 [B, S, k], best first, with ties going to the lower index; -1 in unused slots.
    """
    return get_backend(BACKENDS, backend or backend_for(query, layout, k)).index_topk(
        query, keys, layout, head_weights, visible, k, dtype, batch_invariant
    )


def select_entries(
    query: Tensor,
    keys: Tensor,
    head_weights: Tensor,
    visible: EntryRanges,
    k: int,
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> Tensor:
    """Select the ``k`` visible entries with the best :func:`kernels.index_scores.index_scores`. No gradient.

    Memory does not grow with S * T.

    Args:
        query: [B, S, h, c].
        keys: [B, T, c].
        head_weights: [B, S, h], already scaled.
        visible: The entries that each query selects among.
        k: Entries to select.
        dtype: Scores are rounded to this dtype before they are compared.

    Returns:
        int64 [B, S, min(k, T)], best first, with ties going to the lower index; -1 in unused slots. The ``triton``
        backend rounds queries and keys to BF16, which holds all values of the formats of index keys up to 16 bits.
    """
    B, S = query.shape[:2]
    if not keys.shape[1]:
        return torch.empty(B, S, 0, dtype=torch.int64, device=query.device)
    module = get_backend(BACKENDS, backend or backend_for_sequences(query, k))
    return module.select_entries(query, keys, head_weights, visible, min(k, keys.shape[1]), dtype)
