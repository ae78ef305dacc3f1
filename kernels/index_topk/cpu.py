"""Selection of entries from packed keys by a native operator."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import native
from kernels.autocast import cast, detached
from kernels.cache_io import EntryLayout, Pages
from kernels.index_topk.eager import select_entries

__all__ = ["index_topk", "select_entries"]


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
    """Implement :func:`kernels.index_topk.index_topk`. Scores are always batch-invariant."""
    return native.op("index_topk")(
        cast(detached(query), torch.float32),
        cast(detached(head_weights), torch.float32),
        keys.storage,
        keys.page_table,
        keys.page_size,
        visible,
        k,
        layout.spec,
        dtype == torch.bfloat16,
    )
