"""Batch-invariant attention by an online softmax over tiles of a fixed shape."""

from __future__ import annotations

import torch
from torch import Tensor

INVARIANT_TILE = 64
"""Entries per tile."""


class TiledAttention:
    """Attention accumulated over tiles: a running maximum, sum and weighted sum of values (online softmax).

    If all tiles have the same shape, the bits of a result depend neither on the other queries nor on the number of
    entries that they see. A tile that is masked for a query changes none of its bits.
    """

    def __init__(self, query: Tensor, sink: Tensor):
        """Start with the sink alone: query float32 [N, H, c], sink [H] (logits)."""
        self.query = query * query.shape[-1] ** -0.5
        self.peak = sink.expand(query.shape[:2]).clone()
        self.total = torch.ones_like(self.peak)
        self.values = torch.zeros_like(query)

    def add(self, keys: Tensor, mask: Tensor, values: Tensor | None = None) -> None:
        """Attend to a tile of keys, float32 [N, T, c], where mask, bool [N, T], is True.

        ``values`` are float32 [N, T, c], by default the keys.
        """
        logits = torch.bmm(self.query, keys.transpose(1, 2)).masked_fill(~mask.unsqueeze(1), float("-inf"))
        peak = torch.maximum(self.peak, logits.amax(-1))
        fade = (self.peak - peak).exp()
        weights = (logits - peak.unsqueeze(-1)).exp()
        self.total = self.total * fade + weights.sum(-1)
        self.values = self.values * fade.unsqueeze(-1) + torch.bmm(weights, keys if values is None else values)
        self.peak = peak

    def output(self) -> Tensor:
        """Return the output for all tiles so far: float32 [N, H, c]."""
        return self.values / self.total.unsqueeze(-1)
