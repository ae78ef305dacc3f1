"""The core attention over packed rows: what a cache holds is unpacked where it is used."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cache_io import EntryLayout, unpack

INVARIANT_TILE = 64
"""Entries that are attended to at once where a query's result must not depend on how many there are."""


def packed_attention(
    query: Tensor,
    window_rows: Tensor,
    first: Tensor,
    entry_rows: Tensor | None,
    entry_mask: Tensor | None,
    sink: Tensor,
    layout: EntryLayout,
    window: int,
) -> Tensor:
    """:func:`kernels.sparse_attention.reference.sparse_attention` for a run of tokens, straight from the cache's bytes.

    query float32 [B, S, H, c]; first int64 [B or 1]: position of the first query. window_rows uint8
    [B, window - 1 + S, nbytes]: the tokens before the queries, and theirs; what lies before a sequence's start means
    nothing. entry_rows uint8 [B or 1, T, nbytes], shared by the queries, or [B, S, K, nbytes], gathered for each;
    entry_mask bool [B or 1, S, T or K]. float32 [B, S, H, c]. Work and memory grow with S * S: meant for short runs.
    """
    B, S, H, c = query.shape
    query = query * c**-0.5
    keys = unpack(window_rows, layout)
    logits = torch.bmm(query.flatten(1, 2), keys.transpose(1, 2)).view(B, S, H, -1)
    sees = window_mask(S, window, first).unsqueeze(2)
    parts = [logits.masked_fill(~sees, float("-inf"))]
    entries = None
    if entry_rows is not None and entry_mask is not None:
        entries = unpack(entry_rows, layout)
        if entries.dim() == 3:
            entries = entries.expand(B, -1, -1)
            entry_logits = torch.bmm(query.flatten(1, 2), entries.transpose(1, 2)).view(B, S, H, -1)
        else:
            entry_logits = query @ entries.transpose(2, 3)
        parts.append(entry_logits.masked_fill(~entry_mask.unsqueeze(2), float("-inf")))
    parts.append(sink.view(1, 1, H, 1).expand(B, S, H, 1))
    weights = torch.cat(parts, dim=-1).softmax(-1)
    reach = keys.shape[1]
    out = torch.bmm(weights[..., :reach].flatten(1, 2), keys).view(B, S, H, c)
    if entries is None:
        return out
    entry_weights = weights[..., reach:-1]
    if entries.dim() == 3:
        return out + torch.bmm(entry_weights.flatten(1, 2), entries).view(B, S, H, c)
    return out + entry_weights @ entries


def token_attention(query: Tensor, attended: list[tuple[Tensor, Tensor]], sink: Tensor) -> Tensor:
    """The same for one token: query float32 [H, c] over unpacked rows float32 [T, c] with masks bool [T], several of
    each, in any order. Rows that are masked may hold anything finite. float32 [H, c]."""
    query = query * query.shape[-1] ** -0.5
    logits = [(query @ rows.t()).masked_fill(~mask, float("-inf")) for rows, mask in attended]
    weights = torch.cat([*logits, sink.unsqueeze(-1)], dim=-1).softmax(-1)
    out = torch.zeros_like(query)
    for (rows, _), part in zip(attended, weights[:, :-1].split([len(rows) for rows, _ in attended], dim=-1)):
        out = out + part @ rows
    return out


def window_mask(tokens: int, window: int, first: Tensor) -> Tensor:
    """Which of the ``window - 1 + tokens`` rows each of the tokens sees: bool [B or 1, tokens, window - 1 + tokens]."""
    row = torch.arange(tokens, device=first.device).unsqueeze(1)
    column = torch.arange(window - 1 + tokens, device=first.device)
    band = (column >= row) & (column < row + window)
    return band & (first[:, None, None] + column - (window - 1) >= 0)


class TiledAttention:
    """The same attention built up tile by tile, every tile of the same shape: one token's result has the same bits
    whatever else is computed with it, and however many entries others see.

    A softmax over several tiles keeps its running maximum, sum and weighted values; a tile of which a token sees
    nothing changes none of its bits.
    """

    def __init__(self, query: Tensor, sink: Tensor):
        """query float32 [N, H, c], sink [H]."""
        self.query = query * query.shape[-1] ** -0.5
        self.peak = sink.expand(query.shape[:2]).clone()
        self.total = torch.ones_like(self.peak)
        self.values = torch.zeros_like(query)

    def add(self, keys: Tensor, mask: Tensor, values: Tensor | None = None) -> None:
        """keys float32 [N, T, c], which are the values, too, where there are no others; mask bool [N, T]."""
        logits = torch.bmm(self.query, keys.transpose(1, 2)).masked_fill(~mask.unsqueeze(1), float("-inf"))
        peak = torch.maximum(self.peak, logits.amax(-1))
        fade = (self.peak - peak).exp()
        weights = (logits - peak.unsqueeze(-1)).exp()
        self.total = self.total * fade + weights.sum(-1)
        self.values = self.values * fade.unsqueeze(-1) + torch.bmm(weights, keys if values is None else values)
        self.peak = peak

    def output(self) -> Tensor:
        """float32 [N, H, c]."""
        return self.values / self.total.unsqueeze(-1)
