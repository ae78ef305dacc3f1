"""Attention over a cache in batch-invariant mode: every token is computed at one fixed shape in any batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kernels.cache_io import EntryLayout, unpack
from kernels.paged_attention import EntrySet
from kernels.sparse_attention import INVARIANT_TILE, TiledAttention
from model.forward.context import Context
from model.forward.execution import TOKEN_TILE


def invariant_attention(
    query: Tensor,
    window_rows: Tensor | None,
    entries: EntrySet | None,
    sink: Tensor | None,
    layout: EntryLayout,
    context: Context,
    scale: float | None = None,
    value_size: int | None = None,
) -> Tensor:
    """Compute :func:`kernels.paged_attention.paged_attention` for query [B, S, H, c]. window_rows uint8
    [B, window - 1 + S, nbytes] are those of the tokens before the new ones, then of the new ones; None without a
    window. Returns float32 [B, S, H, value_size]."""
    positions = context.positions.expand(len(query), -1)
    if window_rows is not None:
        window = window_rows.shape[1] - query.shape[1] + 1
        windows = window_rows.unfold(1, window, 1).transpose(2, 3)  # [B, S, window, nbytes]
        age = torch.arange(window - 1, -1, -1, device=query.device)

    def attend(query: Tensor, sequences: Tensor, queries: Tensor) -> Tensor:
        attention = TiledAttention(query, sink, scale, value_size)
        if window_rows is not None:
            exists = age <= positions[sequences, queries].unsqueeze(-1)
            attention.add(unpack(windows[sequences, queries], layout), exists)
        if entries is not None:
            for rows, mask in entry_tiles(entries, sequences, queries):
                attention.add(unpack(rows, layout), mask)
        return attention.output()

    return by_tokens(attend, query)


def entry_tiles(entries: EntrySet, sequences: Tensor, queries: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield packed rows [N, E, nbytes] and masks [N, E] for N tokens, given by sequence and query index (int64 [N]
    each), in pieces of a fixed size E."""
    if entries.chosen is not None:
        chosen = entries.chosen[sequences, queries]
        yield entries.pages.gather_from(sequences, chosen.clamp(min=0)), chosen >= 0
    if entries.visible is not None:
        visible = entries.visible.expand(len(entries.pages.page_table), -1)
        for begin in range(0, int(visible.max()), INVARIANT_TILE):
            places = torch.arange(begin, begin + INVARIANT_TILE, device=visible.device)
            rows = entries.pages.gather_range(begin, begin + INVARIANT_TILE, visible[:, -1])
            yield rows[sequences], places < visible[sequences, queries].unsqueeze(-1)


def by_tokens(attend: Callable[[Tensor, Tensor, Tensor], Tensor], query: Tensor) -> Tensor:
    """Attend in tiles of :data:`TOKEN_TILE` tokens of any sequences. ``attend`` takes their queries [tile, H, c],
    sequence indices and query indices (int64 [tile] each) and returns their outputs [tile, H, ...]."""
    B, S = query.shape[:2]
    outputs = []
    for begin in range(0, B * S, TOKEN_TILE):
        tokens = torch.arange(begin, begin + TOKEN_TILE, device=query.device).clamp(max=B * S - 1)
        sequences, queries = tokens // S, tokens % S
        outputs.append(attend(query[sequences, queries], sequences, queries))
    return torch.cat(outputs)[: B * S].unflatten(0, (B, S))
