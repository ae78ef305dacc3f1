"""Heavily Compressed Attention: every entry is far coarser than in csa, and all of them are attended (report 2.3)."""

from __future__ import annotations

from torch import Tensor

from kernels.paged_attention import EntrySet
from model.cache_parts import LayerCache
from model.mixers.base import Context
from model.mixers.compressed import CompressedAttention, entry_mask, visible_entries


class HeavilyCompressedAttention(CompressedAttention):
    name = "hca"
    overlap = False

    def attend(self, projected: dict[str, Tensor], context: Context) -> Tensor:
        entries = self.pool(projected, context, None)
        return self.core_attention(projected, entries, entry_mask(context, self.ratio, entries), context)[0]

    def select(self, projected: dict[str, Tensor], context: Context, cache: LayerCache) -> EntrySet | None:
        cache.entries.append(self.pool(projected, context, cache.tail))
        if not any(cache.entries.counts):
            return None
        return EntrySet(cache.entries.pages, visible=visible_entries(context, self.ratio))
