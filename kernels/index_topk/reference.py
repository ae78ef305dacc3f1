"""Selection of entries in PyTorch: unpack all keys, score them and select."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cache_io import EntryLayout, Pages
from kernels.cache_io.reference import unpack
from kernels.entry_ranges import EntryRanges
from kernels.index_scores.reference import index_scores
from kernels.index_topk.selection import select_topk


@torch.no_grad()
def index_topk(
    query: Tensor,
    keys: Pages,
    layout: EntryLayout,
    head_weights: Tensor,
    visible: Tensor,
    k: int,
    dtype: torch.dtype = torch.float32,
    batch_invariant: bool = False,
) -> Tensor:
    """Implement :func:`kernels.index_topk.index_topk`. Raises ValueError for ``batch_invariant``."""
    if batch_invariant:
        raise ValueError("index_topk: the reference backend is not batch-invariant")
    limits = visible.expand(query.shape[:2])
    most = int(limits.max())
    rows = keys.gather_range(0, most, limits.amax(1))
    scores = index_scores(query, unpack(rows, layout), head_weights).to(dtype)
    return select_topk(scores, torch.arange(most, device=query.device) < limits.unsqueeze(-1), k)


@torch.no_grad()
def select_entries(
    query: Tensor, keys: Tensor, head_weights: Tensor, visible: EntryRanges, k: int, dtype: torch.dtype
) -> Tensor:
    """Implement :func:`kernels.index_topk.select_entries`."""
    scores = index_scores(query, keys, head_weights).to(dtype)
    return select_topk(scores, visible.mask(keys.shape[1]).contiguous(), k)
