"""Attention over the rows of a cache: unpack the rows of every sequence, then attend as within a whole sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cache_io import EntryLayout
from kernels.cache_io.reference import unpack
from kernels.paged_attention.inputs import EntrySet, TokenRows
from kernels.sparse_attention.reference import sparse_attention


def paged_attention(
    query: Tensor,
    tokens: TokenRows | None,
    entries: EntrySet | None,
    sink: Tensor,
    layout: EntryLayout,
    window: int,
    scale: float,
    value_size: int,
) -> Tensor:
    """Implement :func:`kernels.paged_attention.paged_attention`."""
    B, S = query.shape[:2]
    outputs = []
    for b in range(B):
        window_kv = None
        if tokens is not None:
            first, offset = int(tokens.first.expand(B)[b]), int(tokens.offsets.expand(B)[b])
            positions = torch.arange(max(0, first - (window - 1)), first + S, device=query.device)
            rows = tokens.rows[b, (positions - offset) % tokens.rows.shape[1]]
            window_kv = unpack(rows, layout).unsqueeze(0).to(query.dtype)
        keys, mask = (None, None) if entries is None else _unpack_entries(entries, b, B, layout)
        keys = None if keys is None else keys.to(query.dtype)
        out, _ = sparse_attention(query[b : b + 1], window_kv, keys, mask, sink, window, None, scale, value_size)
        outputs.append(out)
    return torch.cat(outputs)


def _unpack_entries(entries: EntrySet, b: int, B: int, layout: EntryLayout) -> tuple[Tensor, Tensor]:
    """Return the entries of sequence b, [1, T, c] or [1, S, K, c], and their mask [1, S, T or K]."""
    sequence = torch.tensor([b], device=entries.pages.storage.device)
    if entries.chosen is not None:
        chosen = entries.chosen[b : b + 1]
        rows = entries.pages.gather_from(sequence, chosen.clamp(min=0).flatten(1))
        return unpack(rows.unflatten(1, chosen.shape[1:]), layout), chosen >= 0
    assert entries.visible is not None
    visible = entries.visible.expand(B, -1)[b : b + 1]
    indices = torch.arange(int(visible.max()), device=visible.device)
    return unpack(entries.pages.gather_from(sequence, indices.unsqueeze(0)), layout), indices < visible.unsqueeze(-1)
