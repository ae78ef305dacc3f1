"""Heavily Compressed Attention: every entry is far coarser than in csa, and all of them are attended (report 2.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from model.cache_parts import LayerCache
from model.config import ModelConfig
from model.mixers.base import Context
from model.mixers.compressor import Compressor
from model.mixers.sliding import SlidingWindowAttention


class HeavilyCompressedAttention(SlidingWindowAttention):
    name = "hca"

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__(config, layer)
        self.compressor = Compressor(config, config.head_dim, config.hca_ratio, overlap=False)

    def attend(
        self,
        x: Tensor,
        latent: Tensor,
        query: Tensor,
        window_kv: Tensor,
        context: Context,
        cache: LayerCache | None,
    ) -> Tensor:
        new = self.compressor(x, context, cache.tail if cache else None)
        entries = self.precision.round_main(new, self.training)
        if cache is not None:
            cache.entries.append(entries)
            entries = cache.entries.read()
        mask = entry_mask(context, self.config.hca_ratio, entries)
        return self.core_attention(query, window_kv, entries, mask, context)[0]


def visible_entries(context: Context, ratio: int) -> Tensor:
    """How many entries, the first ones, each query may use: int64 [B or 1, S].

    Token t (from 0) sees entry s iff s < (t + 1) // ratio: a block becomes visible to its own last token. The report's
    text can be read one token later; the released code, and so the released weights, do this.
    """
    return (context.positions + 1) // ratio


def entry_mask(context: Context, ratio: int, entries: Tensor) -> Tensor:
    """Which of ``entries`` [B, T, c], pooled from ``ratio`` tokens each, the queries may use: bool [B or 1, S, T]."""
    if context.documents is not None:
        return context.documents.blocks(ratio).mask
    return torch.arange(entries.shape[1], device=entries.device) < visible_entries(context, ratio).unsqueeze(-1)
