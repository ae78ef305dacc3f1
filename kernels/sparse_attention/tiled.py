"""The core attention built up from tiles of one shape, for results that do not depend on what is computed with them."""

from __future__ import annotations

import torch
from torch import Tensor

INVARIANT_TILE = 64
"""Entries that are attended to at once where a query's result must not depend on how many there are."""


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
