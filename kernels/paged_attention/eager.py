"""Attention over the rows of a cache, for groups of queries, whose keys are unpacked where they are used."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cache_io import EntryLayout, Pages, unpack
from kernels.paged_attention.inputs import EntrySet, TokenRows
from kernels.sparse_attention import TiledAttention

_MAX_VALUES = 1 << 22
"""Maximum number of scores or unpacked values per group of several queries."""
_MAX_QUERIES = 64
"""Maximum number of queries per group."""
_TILE = 1024
"""Entries that are unpacked together where there is no window."""


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
    B, S, H, c = query.shape
    if tokens is None and entries is not None and entries.visible is not None:
        return _attend_in_tiles(query, entries.pages, entries.visible, sink, layout, scale, value_size)
    first = tokens.first.expand(B) if tokens is not None else query.new_zeros(B, dtype=torch.int64)
    most = int(entries.visible.max()) if entries is not None and entries.visible is not None else 0
    shared = None
    if entries is not None and entries.visible is not None and most:
        shared = unpack(entries.pages.gather_range(0, most, entries.visible[:, -1].expand(B)), layout)
    per_query = H * most if entries is None or entries.chosen is None else entries.chosen.shape[2] * c
    step = max(1, min(_MAX_QUERIES, _MAX_VALUES // max(1, B * per_query)))
    outputs = []
    for begin in range(0, S, step):
        group = slice(begin, min(begin + step, S))
        keys = None
        if tokens is not None:
            position = first.unsqueeze(-1) + begin - (window - 1)
            positions = (position + torch.arange(window - 1 + group.stop - begin, device=query.device)).clamp(min=0)
            rows = (positions - tokens.offsets.unsqueeze(-1)) % tokens.rows.shape[1]
            keys = unpack(tokens.rows.gather(1, rows.unsqueeze(-1).expand(-1, -1, tokens.rows.shape[2])), layout)
        entry_keys, mask = shared, None
        if entries is not None and entries.chosen is not None:
            chosen = entries.chosen[:, group]
            entry_keys, mask = unpack(entries.pages.gather(chosen.clamp(min=0)), layout), chosen >= 0
        elif entries is not None and entries.visible is not None and shared is not None:
            mask = torch.arange(most, device=query.device) < entries.visible[:, group].unsqueeze(-1)
        some = query[:, group] * scale
        outputs.append(_attention(some, keys, first + begin, entry_keys, mask, sink, window, value_size))
    return torch.cat(outputs, dim=1)


def _attend_in_tiles(
    query: Tensor, pages: Pages, visible: Tensor, sink: Tensor, layout: EntryLayout, scale: float, value_size: int
) -> Tensor:
    """Attend to the first ``visible`` entries, int64 [B or 1, S], of which tiles are unpacked in turn."""
    B, _, H, _ = query.shape
    visible = visible.expand(B, -1)
    step = max(1, min(_MAX_QUERIES, _MAX_VALUES // (B * H * _TILE)))
    outputs = []
    for some, seen in zip(query.split(step, dim=1), visible.split(step, dim=1)):
        attention = TiledAttention(some.flatten(1, 2), sink.repeat(some.shape[1]), scale, value_size)
        limits = seen.repeat_interleave(H, dim=1).unsqueeze(-1)
        most = int(seen.max())
        for begin in range(0, most, _TILE):
            end = min(begin + _TILE, most)
            rows = pages.gather_range(begin, end, seen[:, -1])
            attention.add(unpack(rows, layout), torch.arange(begin, end, device=query.device) < limits)
        outputs.append(attention.output().unflatten(1, (-1, H)))
    return torch.cat(outputs, dim=1)


def _attention(
    query: Tensor,
    keys: Tensor | None,
    first: Tensor,
    entries: Tensor | None,
    entry_mask: Tensor | None,
    sink: Tensor,
    window: int,
    value_size: int,
) -> Tensor:
    """Attend from scaled query [B, S, H, c] at positions first [B] and following.

    keys [B, window - 1 + S, c] are the tokens before the queries and theirs; entries [B, T, c], shared by all queries,
    or [B, S, K, c]; entry_mask bool [B or 1, S, T or K].
    """
    B, S, H, _ = query.shape
    parts = []
    if keys is not None:
        logits = torch.bmm(query.flatten(1, 2), keys.transpose(1, 2)).view(B, S, H, -1)
        parts.append(logits.masked_fill(~_window_mask(S, window, first).unsqueeze(2), float("-inf")))
    if entries is not None and entry_mask is not None:
        if entries.dim() == 3:
            entry_logits = torch.bmm(query.flatten(1, 2), entries.transpose(1, 2)).view(B, S, H, -1)
        else:
            entry_logits = query @ entries.transpose(2, 3)
        parts.append(entry_logits.masked_fill(~entry_mask.unsqueeze(2), float("-inf")))
    parts.append(sink.view(1, 1, H, 1).expand(B, S, H, 1))
    weights = torch.cat(parts, dim=-1).softmax(-1)
    n_window = 0
    out = query.new_zeros(B, S, H, value_size)
    if keys is not None:
        n_window = keys.shape[1]
        out = torch.bmm(weights[..., :n_window].flatten(1, 2), keys[..., :value_size]).view_as(out)
    if entries is None or entry_mask is None:
        return out
    values, entry_weights = entries[..., :value_size], weights[..., n_window:-1]
    if values.dim() == 3:
        return out + torch.bmm(entry_weights.flatten(1, 2), values).view_as(out)
    return out + entry_weights @ values


def _window_mask(tokens: int, window: int, first: Tensor) -> Tensor:
    """Return the rows that each of the tokens sees: bool [B, tokens, window - 1 + tokens]."""
    row = torch.arange(tokens, device=first.device).unsqueeze(1)
    column = torch.arange(window - 1 + tokens, device=first.device)
    band = (column >= row) & (column < row + window)
    return band & (first[:, None, None] + column - (window - 1) >= 0)
