"""Sliding-window attention with latent queries, one shared key-value head, a sink and grouped output (report 2.3).

csa and hca layers are this plus a compressed history; the released models begin with plain ones (Flash).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernels.sparse_attention import sparse_attention
from model.cache_parts import LayerCache
from model.config import ModelConfig
from model.mixers.base import Context, Mixer
from model.norm import RMSNorm, rms_normalize


class SlidingWindowAttention(Mixer):
    """Every query sees the last ``window`` tokens, itself included. Key and value are one vector [head_dim]."""

    name = "sliding"

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__(config, layer)
        c = config
        self.wq_a = nn.Linear(c.hidden_size, c.q_lora_rank, bias=False)
        self.q_norm = RMSNorm(c.q_lora_rank, c.norm_eps)
        self.wq_b = nn.Linear(c.q_lora_rank, c.num_heads * c.head_dim, bias=False)
        self.wkv = nn.Linear(c.hidden_size, c.head_dim, bias=False)
        self.kv_norm = RMSNorm(c.head_dim, c.norm_eps)
        self.sink = nn.Parameter(torch.zeros(c.num_heads))
        group = c.num_heads // c.o_groups * c.head_dim
        self.wo_a = nn.Parameter(torch.empty(c.o_groups, c.o_lora_rank, group))
        self.wo_b = nn.Linear(c.o_groups * c.o_lora_rank, c.hidden_size, bias=False)

    def forward(self, x: Tensor, context: Context, cache: LayerCache | None = None) -> Tensor:
        c = self.config
        rotation = context.rotation[self.name]
        latent = self.q_norm(self.wq_a(x))
        query = rms_normalize(self.wq_b(latent).unflatten(-1, (c.num_heads, c.head_dim)), c.norm_eps)
        query = rotation.apply(query)
        kv = self.precision.round_main(rotation.apply(self.kv_norm(self.wkv(x))), self.training)
        window_kv = kv if cache is None else torch.cat((cache.window.read(), kv), dim=1)
        out = self.attend(x, latent, query, window_kv, context, cache)
        if cache is not None:
            cache.window.append(kv)
        # The values carry rotary dims at their own positions; turning the sum back by the query's leaves the offset.
        return self.project(rotation.apply(out, inverse=True))

    def attend(
        self,
        x: Tensor,
        latent: Tensor,
        query: Tensor,
        window_kv: Tensor,
        context: Context,
        cache: LayerCache | None,
    ) -> Tensor:
        """Core attention, [B, S, H, head_dim]. Subclasses add their history.

        x [B, S, hidden], latent [B, S, q_lora_rank], query [B, S, H, head_dim], window_kv [B, P + S, head_dim].
        """
        return self.core_attention(query, window_kv, None, None, context)[0]

    def core_attention(
        self, query: Tensor, window_kv: Tensor, entries: Tensor | None, mask: Tensor | None, context: Context
    ) -> tuple[Tensor, Tensor | None]:
        """:func:`kernels.sparse_attention.sparse_attention` with this layer's sink and window."""
        window = self.config.window
        whole = window_kv.shape[1] == query.shape[1] and context.documents is None
        reach = None if whole else (context.positions + 1).clamp(max=window).expand(query.shape[:2])
        return sparse_attention(query, window_kv, entries, mask, self.sink, window, reach)

    def project(self, out: Tensor) -> Tensor:
        """Grouped low-rank output projection: [B, S, H, head_dim] -> [B, S, hidden] (report 2.3.1)."""
        groups = out.flatten(2).unflatten(-1, (self.config.o_groups, -1))
        return self.wo_b(torch.einsum("bsgi,goi->bsgo", groups, self.wo_a.to(groups.dtype)).flatten(2))
