"""Heavily Compressed Attention: coarse entries, all of which are attended to (report 2.3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from kernels.paged_attention import EntrySet
from model.forward.context import Context
from model.mixers.compressed import CompressedAttention, entry_ranges, visible_entries
from model.mixers.sliding import History, Projected

if TYPE_CHECKING:
    from model.cache.layer_cache import LayerCache
    from model.config import ModelConfig


class HeavilyCompressedAttention(CompressedAttention):
    """Attention to the sliding window and to all visible entries, which are few."""

    name = "hca"
    ratio_field = "hca_ratio"
    overlap = False

    @classmethod
    def attended_entries(cls, config: ModelConfig, tokens: int) -> int:
        return tokens // config.hca_ratio

    def attend(self, projected: Projected, context: Context) -> Tensor:
        entries = self.pool(projected.history, context)
        return self.core_attention(projected, entries, entry_ranges(context, self.ratio), context)[0]

    def select(self, history: History, context: Context, cache: LayerCache) -> EntrySet:
        self.append(history, context, cache)
        return EntrySet(cache.entries.pages, visible=visible_entries(context, self.ratio))
