"""Heavily Compressed Attention: every entry is far coarser than in csa, and all of them are attended (report 2.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from model.cache_parts import LayerCache
from model.execution import few_sizes
from model.mixers.base import Context
from model.mixers.cached import Selection, Shared
from model.mixers.compressed import CompressedAttention, entry_mask, visible_entries


class HeavilyCompressedAttention(CompressedAttention):
    name = "hca"
    overlap = False

    def attend(self, projected: dict[str, Tensor], context: Context) -> Tensor:
        entries = self.pool(projected, context, None)
        return self.core_attention(projected, entries, entry_mask(context, self.ratio, entries), context)[0]

    def select(self, projected: dict[str, Tensor], context: Context, cache: LayerCache) -> Selection | None:
        cache.entries.append(self.pool(projected, context, cache.tail))
        return Shared(cache.entries, visible_entries(context, self.ratio)) if any(cache.entries.counts) else None

    def past(self, cache: LayerCache) -> dict[str, Tensor]:
        return {**super().past(cache), "entries": cache.entries.at_least(few_sizes(cache.entries.counts[0]))}

    def attended_entries(
        self, projected: dict[str, Tensor], past: dict[str, Tensor], paused: dict[str, Tensor], position: Tensor
    ) -> list[tuple[Tensor, Tensor]]:
        entries = self.unpacked(past["entries"])
        seen = torch.arange(len(entries), device=entries.device) < position // self.ratio
        return [(entries, seen), (projected["entry"][0], (position + 1) % self.ratio == 0)]
