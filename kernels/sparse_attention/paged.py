"""The core attention over packed rows where a cache keeps them: they are unpacked where they are used."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.cache_io import EntryLayout, Pages, unpack

_VALUES = 1 << 22
"""Most values that a run of queries takes at once."""
_QUERIES = 64


@dataclass(frozen=True)
class TokenRows:
    """Packed rows of the newest tokens: the row of position p is row ``(p - offset) % R``."""

    rows: Tensor
    """uint8 [B, R, nbytes], the queries' own tokens and the window before them among them."""
    offsets: Tensor
    """int64 [B or 1]"""
    first: Tensor
    """int64 [B or 1]: position of the first query."""


@dataclass(frozen=True)
class EntrySet:
    """Packed entries that each of the queries attends to: one of ``chosen`` and ``visible`` is given."""

    pages: Pages
    chosen: Tensor | None = None
    """int64 [B, S, K]; -1 in unused places."""
    visible: Tensor | None = None
    """int64 [B or 1, S], not decreasing in S: the first so many."""


def paged_attention(
    query: Tensor, tokens: TokenRows, entries: EntrySet | None, sink: Tensor, layout: EntryLayout, window: int
) -> Tensor:
    """:func:`kernels.sparse_attention.reference.sparse_attention` of new tokens over a cache.

    query float32 [B, S, H, c] at positions ``tokens.first`` and on; sink [H]. Returns float32 [B, S, H, c]. Queries are
    taken in runs, so that memory stays bounded.
    """
    B, S, H, c = query.shape
    first = tokens.first.expand(B)
    most = int(entries.visible.max()) if entries is not None and entries.visible is not None else 0
    shared = None
    if entries is not None and entries.visible is not None and most:
        places = torch.arange(most, device=query.device).expand(B, -1)
        # A sequence with fewer entries has no page for the later ones; they are masked.
        last = entries.visible[:, -1:].expand(B, 1) - 1
        shared = unpack(entries.pages.gather(places.minimum(last.clamp(min=0))), layout)
    each = H * most if entries is None or entries.chosen is None else entries.chosen.shape[2] * c
    step = max(1, min(_QUERIES, _VALUES // max(1, B * each)))
    runs = []
    for begin in range(0, S, step):
        run = slice(begin, min(begin + step, S))
        position = first.unsqueeze(-1) + begin - (window - 1)
        places = (position + torch.arange(window - 1 + run.stop - begin, device=query.device)).clamp(min=0)
        near = (places - tokens.offsets.unsqueeze(-1)) % tokens.rows.shape[1]
        keys = unpack(tokens.rows.gather(1, near.unsqueeze(-1).expand(-1, -1, tokens.rows.shape[2])), layout)
        far, mask = shared, None
        if entries is not None and entries.chosen is not None:
            chosen = entries.chosen[:, run]
            far, mask = unpack(entries.pages.gather(chosen.clamp(min=0)), layout), chosen >= 0
        elif entries is not None and entries.visible is not None and shared is not None:
            mask = torch.arange(most, device=query.device) < entries.visible[:, run].unsqueeze(-1)
        runs.append(_attention(query[:, run], keys, first + begin, far, mask, sink, window))
    return torch.cat(runs, dim=1)


def _attention(
    query: Tensor,
    keys: Tensor,
    first: Tensor,
    entries: Tensor | None,
    entry_mask: Tensor | None,
    sink: Tensor,
    window: int,
) -> Tensor:
    """query [B, S, H, c] at positions first [B] and on; keys [B, window - 1 + S, c]: the tokens before, and theirs.
    entries [B, T, c] for all queries or [B, S, K, c]; entry_mask bool [B or 1, S, T or K]."""
    B, S, H, c = query.shape
    query = query * c**-0.5
    logits = torch.bmm(query.flatten(1, 2), keys.transpose(1, 2)).view(B, S, H, -1)
    parts = [logits.masked_fill(~_window_mask(S, window, first).unsqueeze(2), float("-inf"))]
    if entries is not None and entry_mask is not None:
        if entries.dim() == 3:
            entry_logits = torch.bmm(query.flatten(1, 2), entries.transpose(1, 2)).view(B, S, H, -1)
        else:
            entry_logits = query @ entries.transpose(2, 3)
        parts.append(entry_logits.masked_fill(~entry_mask.unsqueeze(2), float("-inf")))
    parts.append(sink.view(1, 1, H, 1).expand(B, S, H, 1))
    weights = torch.cat(parts, dim=-1).softmax(-1)
    reach = keys.shape[1]
    out = torch.bmm(weights[..., :reach].flatten(1, 2), keys).view(B, S, H, c)
    if entries is None or entry_mask is None:
        return out
    entry_weights = weights[..., reach:-1]
    if entries.dim() == 3:
        return out + torch.bmm(entry_weights.flatten(1, 2), entries).view(B, S, H, c)
    return out + entry_weights @ entries


def _window_mask(tokens: int, window: int, first: Tensor) -> Tensor:
    """Which of the ``window - 1 + tokens`` rows each of the tokens sees: bool [B, tokens, window - 1 + tokens]."""
    row = torch.arange(tokens, device=first.device).unsqueeze(1)
    column = torch.arange(window - 1 + tokens, device=first.device)
    band = (column >= row) & (column < row + window)
    return band & (first[:, None, None] + column - (window - 1) >= 0)
