"""Grouped-query attention over all past tokens: the standard that the hybrid is measured against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.quantize import fake_quantize
from model.cache_parts import LayerCache
from model.config import ModelConfig
from model.mixers.base import Context, Mixer
from model.precision import gqa_format


class GroupedQueryAttention(Mixer):
    """``num_heads`` query heads share ``num_kv_heads`` key and value heads; rotary positions on the whole head."""

    name = "gqa"

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__(config, layer)
        c = config
        self.wq = nn.Linear(c.hidden_size, c.num_heads * c.head_dim, bias=False)
        self.wk = nn.Linear(c.hidden_size, c.num_kv_heads * c.head_dim, bias=False)
        self.wv = nn.Linear(c.hidden_size, c.num_kv_heads * c.head_dim, bias=False)
        self.wo = nn.Linear(c.num_heads * c.head_dim, c.hidden_size, bias=False)

    def forward(self, x: Tensor, context: Context, cache: LayerCache | None = None) -> Tensor:
        c = self.config
        rotation = context.rotation[self.name]
        query = rotation.apply(self.wq(x).unflatten(-1, (c.num_heads, c.head_dim)))
        key = rotation.apply(self.wk(x).unflatten(-1, (c.num_kv_heads, c.head_dim)))
        value = self.wv(x).unflatten(-1, (c.num_kv_heads, c.head_dim))
        if not self.training or c.qat:
            key, value = (fake_quantize(t, gqa_format(c)) for t in (key, value))
        mask = None
        if context.documents is not None:
            mask = context.documents.causal_mask().unsqueeze(1)
        if cache is not None:
            cache.entries.append(torch.cat((key, value), dim=-1).flatten(2))
            key, value = cache.entries.read().unflatten(-1, (c.num_kv_heads, 2 * c.head_dim)).chunk(2, dim=-1)
            mask = torch.arange(key.shape[1], device=x.device) <= context.positions.unsqueeze(-1).unsqueeze(1)
        out = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=True,
        )
        return self.wo(out.transpose(1, 2).flatten(2))
