"""Selection of compressed entries by the lightning indexer (report eq. 17)."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import native
from kernels.backends import get_backend
from kernels.cache_io import EntryLayout, Pages
from kernels.index_topk import cpu, eager, reference, triton
from kernels.index_topk.selection import select_topk
from kernels.triton_support.platform import can_run

__all__ = ["BACKENDS", "backend_for", "index_topk", "select_topk"]

BACKENDS = {"reference": reference, "eager": eager, "cpu": cpu, "triton": triton}


def backend_for(query: Tensor, layout: EntryLayout, k: int) -> str:
    """Return the backend for query, keys of this layout, and k."""
    if can_run(query) and triton.supports(query, layout, k):
        return "triton"
    return "cpu" if query.is_cpu and native.level() is not None else "eager"


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
