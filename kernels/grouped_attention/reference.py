"""Grouped-query attention over a cache, one sequence after another."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cache_io import EntryLayout, Pages
from kernels.cache_io.reference import unpack


def grouped_attention(query: Tensor, pages: Pages, visible: Tensor, kv_heads: int, layout: EntryLayout) -> Tensor:
    """Implement :func:`kernels.grouped_attention.grouped_attention`."""
    B, _, H, c = query.shape
    outputs = []
    for b, limits in enumerate(visible.expand(B, -1)):
        sequence = torch.tensor([b], device=query.device)
        tokens = torch.arange(int(limits.max()), device=query.device)
        rows = unpack(pages.gather_from(sequence, tokens.unsqueeze(0)), layout)[0]
        key, value = rows.unflatten(-1, (kv_heads, 2, c)).repeat_interleave(H // kv_heads, dim=1).to(query).unbind(2)
        logits = torch.einsum("shc,thc->sht", query[b], key) * c**-0.5
        hidden = (tokens >= limits.unsqueeze(-1)).unsqueeze(1)
        weights = logits.masked_fill(hidden, float("-inf")).softmax(-1)
        outputs.append(torch.einsum("sht,thc->shc", weights, value))
    return torch.stack(outputs)
