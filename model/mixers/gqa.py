"""Grouped-query attention over all past tokens: the standard that the hybrid is measured against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cache_io import unpack
from kernels.paged_attention import EntrySet
from kernels.sparse_attention import TiledAttention
from model.cache_parts import LayerCache
from model.config import ModelConfig
from model.linear import Linear
from model.mixers.base import Context, Mixer
from model.mixers.invariant import by_tokens, entry_tiles
from model.rope import Rotation

_SCORES = 1 << 22
"""Most scores that a run of queries takes at once."""


class GroupedQueryAttention(Mixer):
    """``num_heads`` query heads share ``num_kv_heads`` key and value heads; rotary positions on the whole head."""

    name = "gqa"

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__(config, layer)
        c = config
        self.wq = Linear(c.hidden_size, c.num_heads * c.head_dim)
        self.wk = Linear(c.hidden_size, c.num_kv_heads * c.head_dim)
        self.wv = Linear(c.hidden_size, c.num_kv_heads * c.head_dim)
        self.wo = Linear(c.num_heads * c.head_dim, c.hidden_size)

    def project(self, x: Tensor, rotation: Rotation, cached: bool) -> dict[str, Tensor]:
        """query [B, S, H, head_dim], and keys beside values as stored, [B, S, num_kv_heads * 2 * head_dim]."""
        c = self.config
        query = rotation.apply(self.wq(x).unflatten(-1, (c.num_heads, c.head_dim)))
        key = rotation.apply(self.wk(x).unflatten(-1, (c.num_kv_heads, c.head_dim)))
        value = self.wv(x).unflatten(-1, (c.num_kv_heads, c.head_dim))
        rows = self.precision.round_gqa(torch.cat((key, value), dim=-1).flatten(2), self.training)
        return {"query": query, "rows": rows}

    def mix(self, projected: dict[str, Tensor], context: Context, cache: LayerCache | None) -> Tensor:
        query, rows = projected["query"], projected["rows"]
        mask = None
        if context.documents is not None:
            mask = context.documents.causal_mask().unsqueeze(1)
        if cache is not None:
            cache.entries.append(rows)
            visible = context.positions + 1
            if context.execution.batch_invariant:
                return self._token_by_token(query, EntrySet(cache.entries.pages, visible=visible))
            rows = unpack(cache.entries.rows(), self.precision.gqa_layout)
            places = torch.arange(rows.shape[1], device=rows.device)
            # Runs of queries, so that their scores take a bounded memory.
            step = max(1, min(64, _SCORES // (len(query) * query.shape[2] * len(places))))
            return torch.cat(
                [
                    self._attention(some, rows, (places < seen.unsqueeze(-1)).unsqueeze(1))
                    for some, seen in zip(query.split(step, dim=1), visible.split(step, dim=1))
                ],
                dim=1,
            )
        return self._attention(query, rows, mask)

    def _attention(self, query: Tensor, rows: Tensor, mask: Tensor | None) -> Tensor:
        """query [B, S, H, head_dim] over rows [B, T, keys beside values]; mask bool [B, 1, S, T], None for causal."""
        key, value = (x.transpose(1, 2) for x in self._heads(rows))
        out = F.scaled_dot_product_attention(
            query.transpose(1, 2), key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        return out.transpose(1, 2)

    def _heads(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Rows [..., num_kv_heads * 2 * head_dim] to keys and values [..., num_kv_heads, head_dim]."""
        return rows.unflatten(-1, (self.config.num_kv_heads, -1)).chunk(2, dim=-1)

    def _token_by_token(self, query: Tensor, history: EntrySet) -> Tensor:
        c = self.config
        kv, group = c.num_kv_heads, c.num_heads // c.num_kv_heads

        def attend(query: Tensor, sequences: Tensor, queries: Tensor) -> Tensor:
            heads = query.view(-1, group, c.head_dim)  # every key-value head on its own
            attention = TiledAttention(heads, query.new_full((group,), float("-inf")))
            for rows, mask in entry_tiles(history, sequences, queries):
                both = self._heads(unpack(rows, self.precision.gqa_layout))
                key, value = (x.transpose(1, 2).flatten(0, 1) for x in both)
                attention.add(key, mask.repeat_interleave(kv, dim=0), value)
            return attention.output().view_as(query)

        return by_tokens(attend, query)

    def output(self, mixed: Tensor, rotation: Rotation) -> Tensor:
        return self.wo(mixed.flatten(2))
