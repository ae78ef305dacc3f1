"""Grouped-query attention over a cache: all rows are unpacked, then PyTorch attends for groups of queries."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cache_io import EntryLayout, Pages, unpack

_MAX_SCORES = 1 << 22
"""Limit on scores computed at once."""
_MAX_QUERIES = 64
"""Maximum number of queries per group."""


def grouped_attention(query: Tensor, pages: Pages, visible: Tensor, kv_heads: int, layout: EntryLayout) -> Tensor:
    """Implement :func:`kernels.grouped_attention.grouped_attention`."""
    B, _, H, c = query.shape
    most = int(visible.max())
    rows = unpack(pages.gather_range(0, most, visible[:, -1].expand(B)), layout).to(query.dtype)
    key, value = rows.unflatten(-1, (kv_heads, 2, c)).transpose(1, 2).unbind(3)
    tokens = torch.arange(most, device=query.device)
    step = max(1, min(_MAX_QUERIES, _MAX_SCORES // (B * H * most)))
    outputs = []
    for some, seen in zip(query.split(step, dim=1), visible.split(step, dim=1)):
        mask = (tokens < seen.unsqueeze(-1)).unsqueeze(1)
        out = F.scaled_dot_product_attention(some.transpose(1, 2), key, value, attn_mask=mask, enable_gqa=True)
        outputs.append(out.transpose(1, 2))
    return torch.cat(outputs, dim=1)
