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

    def __init__(
        self, query: Tensor, sink: Tensor | None = None, scale: float | None = None, value_size: int | None = None
    ):
        """Start with the sink alone: query float32 [N, H, c], sink [H] (logits). Without a sink, every query must see
        part of the first tile.

        ``scale`` is the softmax scale, by default ``c ** -0.5``. ``value_size`` is the number of dims of values, by
        default c.
        """
        self.query = query * (query.shape[-1] ** -0.5 if scale is None else scale)
        if sink is None:
            sink = query.new_full(query.shape[1:2], float("-inf"))
        self.peak = sink.expand(query.shape[:2]).clone()
        self.total = torch.ones_like(self.peak)
        self.size = query.shape[-1] if value_size is None else value_size
        self.values = query.new_zeros(*query.shape[:2], self.size)

    def add(self, keys: Tensor, mask: Tensor, values: Tensor | None = None) -> None:
        """Attend to a tile of keys, float32 [N, T, c], where mask, bool [N, T] or [N, H, T], is True.

        ``values`` are float32 [N, T, value_size], by default the first dims of the keys.
        """
        if mask.dim() == 2:
            mask = mask.unsqueeze(1)
        logits = torch.bmm(self.query, keys.transpose(1, 2)).masked_fill(~mask, float("-inf"))
        peak = torch.maximum(self.peak, logits.amax(-1))
        fade = (self.peak - peak).exp()
        weights = (logits - peak.unsqueeze(-1)).exp()
        self.total = self.total * fade + weights.sum(-1)
        values = keys[..., : self.size] if values is None else values
        self.values = self.values * fade.unsqueeze(-1) + torch.bmm(weights, values)
        self.peak = peak

    def output(self) -> Tensor:
        """Return the output for all tiles so far: float32 [N, H, value_size]."""
        return self.values / self.total.unsqueeze(-1)
