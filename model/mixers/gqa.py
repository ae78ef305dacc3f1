"""Grouped-query attention over all past tokens: the baseline."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cache_io import EntryLayout, unpack
from kernels.paged_attention import EntrySet
from kernels.sparse_attention import TiledAttention
from model.cache.parts import CachePart, GrowingPart
from model.forward.context import Context
from model.layers.linear import Linear
from model.layers.rope import Rotary, Rotation
from model.mixers.base import Mixer, StoredFormat, require
from model.mixers.batch_invariant import by_tokens, entry_tiles
from model.work import Work

if TYPE_CHECKING:
    from model.cache.layer_cache import LayerCache
    from model.config import ModelConfig

_MAX_SCORES = 1 << 22
"""Limit on scores computed at once."""


class Projected(NamedTuple):
    """Inputs of the attention."""

    query: Tensor
    """float32 [B, S, H, head_dim]"""
    rows: Tensor
    """float32 [B, S, num_kv_heads * 2 * head_dim]: each head's key beside its value, as stored."""


class GroupedQueryAttention(Mixer):
    """``num_heads`` query heads share ``num_kv_heads`` key and value heads. Rotary positions on the whole head."""

    name = "gqa"
    formats = ("gqa_format",)
    batch_invariant_widths = ("head_dim",)

    @classmethod
    def layout(cls, config: ModelConfig) -> EntryLayout:
        """Return the layout of a token's keys and values of all heads. Where heads are narrower than a block of the
        format, neighbors share a scale."""
        return EntryLayout(2 * config.num_kv_heads * config.head_dim, config.gqa_format)

    @classmethod
    def check(cls, config: ModelConfig) -> None:
        heads, kv_heads = config.num_heads, config.num_kv_heads
        require(heads % kv_heads == 0, f"num_heads: {heads} query heads do not divide into num_kv_heads {kv_heads}")

    @classmethod
    def rotary(cls, config: ModelConfig) -> Rotary:
        return Rotary(config.head_dim, config.rope_theta)

    @classmethod
    def cache_parts(cls, config: ModelConfig) -> dict[str, CachePart]:
        return {"entries": GrowingPart(cls.layout(config), 1, cls.name)}

    @classmethod
    def stored_formats(cls, config: ModelConfig) -> list[StoredFormat]:
        return [StoredFormat("gqa keys and values", config.gqa_format, 1)]

    @classmethod
    def work(cls, config: ModelConfig, tokens: int) -> list[Work]:
        c = config
        heads, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        return [
            Work("attention projections", "linear", "fp8", 2.0 * 2 * c.hidden_size * (heads + kv)),
            Work("core attention, gqa", "core", "bf16", 4.0 * heads * tokens),
        ]

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__(config, layer)
        c = config
        self.wq = Linear(c.hidden_size, c.num_heads * c.head_dim)
        self.wk = Linear(c.hidden_size, c.num_kv_heads * c.head_dim)
        self.wv = Linear(c.hidden_size, c.num_kv_heads * c.head_dim)
        self.wo = Linear(c.num_heads * c.head_dim, c.hidden_size)

    def set_config(self, config: ModelConfig) -> None:
        super().set_config(config)
        self.entry_layout = self.layout(config)

    def zero_output(self) -> None:
        self.wo.weight.zero_()

    def project(self, x: Tensor, rotation: Rotation | None, context: Context, cached: bool) -> Projected:
        assert rotation is not None
        c = self.config
        query = rotation.apply(self.wq(x).unflatten(-1, (c.num_heads, c.head_dim)))
        key = rotation.apply(self.wk(x).unflatten(-1, (c.num_kv_heads, c.head_dim)))
        value = self.wv(x).unflatten(-1, (c.num_kv_heads, c.head_dim))
        rows = torch.cat((key, value), dim=-1).flatten(2)
        return Projected(query, self.precision.round_to(rows, "gqa", self.entry_layout, self.training, context.aux))

    def mix(self, projected: Projected, context: Context, cache: LayerCache | None) -> Tensor:
        """Return the attention's outputs, float32 [B, S, H, head_dim]."""
        query, rows = projected
        if cache is None:
            mask = None if context.documents is None else context.documents.causal_mask().unsqueeze(1)
            return self._attention(query, rows, mask)
        cache.entries.append(rows)
        visible = context.positions + 1
        if context.batch_invariant:
            return self._token_by_token(query, EntrySet(cache.entries.pages, visible=visible))
        rows = unpack(cache.entries.rows(), self.entry_layout)
        places = torch.arange(rows.shape[1], device=rows.device)
        step = max(1, min(64, _MAX_SCORES // (len(query) * query.shape[2] * len(places))))
        runs = zip(query.split(step, dim=1), visible.split(step, dim=1))
        outputs = [self._attention(some, rows, (places < seen.unsqueeze(-1)).unsqueeze(1)) for some, seen in runs]
        return torch.cat(outputs, dim=1)

    def _attention(self, query: Tensor, rows: Tensor, mask: Tensor | None) -> Tensor:
        """Attend with query [B, S, H, head_dim] to rows [B, T, ...]. mask bool [B, 1, S, T]; None is causal."""
        key, value = (x.transpose(1, 2) for x in self._heads(rows))
        out = F.scaled_dot_product_attention(
            query.transpose(1, 2), key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        return out.transpose(1, 2)

    def _heads(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Split rows [..., num_kv_heads * 2 * head_dim] into keys and values [..., num_kv_heads, head_dim]."""
        return rows.unflatten(-1, (self.config.num_kv_heads, -1)).chunk(2, dim=-1)

    def _token_by_token(self, query: Tensor, history: EntrySet) -> Tensor:
        c = self.config
        kv, group = c.num_kv_heads, c.num_heads // c.num_kv_heads

        def attend(query: Tensor, sequences: Tensor, queries: Tensor) -> Tensor:
            heads = query.view(-1, group, c.head_dim)  # every key-value head on its own
            attention = TiledAttention(heads)
            for rows, mask in entry_tiles(history, sequences, queries):
                both = self._heads(unpack(rows, self.entry_layout))
                key, value = (x.transpose(1, 2).flatten(0, 1) for x in both)
                attention.add(key, mask.repeat_interleave(kv, dim=0), value)
            return attention.output().view_as(query)

        return by_tokens(attend, query)

    def output(self, mixed: Tensor, rotation: Rotation | None) -> Tensor:
        return self.wo(mixed.flatten(2))
