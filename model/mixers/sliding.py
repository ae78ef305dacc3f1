"""Sliding-window attention with latent queries, one shared key-value head, a sink and grouped output (report 2.3).

csa and hca layers are this plus a compressed history; the released models begin with plain ones (Flash).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernels.autocast import cast, product_dtype
from kernels.paged_attention import EntrySet, paged_attention
from kernels.projection import grouped_output, key_value, latent_query, packed_key_value
from kernels.sparse_attention import sparse_attention
from model.cache_parts import LayerCache
from model.config import ModelConfig
from model.linear import Linear
from model.mixers.base import Context, Mixer
from model.mixers.invariant import invariant_attention
from model.norm import RMSNorm
from model.rope import Rotation


class SlidingWindowAttention(Mixer):
    """Every query sees the last ``window`` tokens, itself included. Key and value are one vector [head_dim]."""

    name = "sliding"

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__(config, layer)
        c = config
        self.wq_a = Linear(c.hidden_size, c.q_lora_rank)
        self.q_norm = RMSNorm(c.q_lora_rank, c.norm_eps)
        self.wq_b = Linear(c.q_lora_rank, c.num_heads * c.head_dim)
        self.wkv = Linear(c.hidden_size, c.head_dim)
        self.kv_norm = RMSNorm(c.head_dim, c.norm_eps)
        self.sink = nn.Parameter(torch.zeros(c.num_heads))
        group = c.num_heads // c.o_groups * c.head_dim
        self.wo_a = nn.Parameter(torch.empty(c.o_groups, c.o_lora_rank, group))
        self.wo_b = Linear(c.o_groups * c.o_lora_rank, c.hidden_size)

    def project(self, x: Tensor, rotation: Rotation, cached: bool) -> dict[str, Tensor]:
        """query [B, S, H, head_dim], what :meth:`project_history` adds, and the tokens' key-values: kv
        [B, S, head_dim], or for a cache packed window_rows uint8 [B, S, nbytes]."""
        narrow = cast(x, product_dtype(x))  # once for all products
        heads, eps = self.config.num_heads, self.config.norm_eps
        latent, query = latent_query(
            narrow, self.wq_a.weight, self.q_norm.weight, self.wq_b.weight, *rotation, heads, eps
        )
        projected = {"query": query, **self.project_history(x, latent, rotation)}
        key_value_of = narrow, self.wkv.weight, self.kv_norm.weight, *rotation, eps
        if cached:
            return projected | {"window_rows": packed_key_value(*key_value_of, self.precision.main_layout)}
        return projected | {"kv": self.precision.round_main(key_value(*key_value_of), self.training)}

    def project_history(self, x: Tensor, latent: Tensor, rotation: Rotation) -> dict[str, Tensor]:
        """What a subclass needs for its compressed history. latent [B, S, q_lora_rank]."""
        return {}

    def mix(self, projected: dict[str, Tensor], context: Context, cache: LayerCache | None) -> Tensor:
        if cache is None:
            return self.attend(projected, context)
        selection = self.select(projected, context, cache)
        query, rows, layout = projected["query"], projected["window_rows"], self.precision.main_layout
        if context.execution.batch_invariant:
            return invariant_attention(query, cache.window.extend(rows), selection, self.sink, layout, context)
        return paged_attention(query, cache.window.attended(rows), selection, self.sink, layout, self.config.window)

    def attend(self, projected: dict[str, Tensor], context: Context) -> Tensor:
        """Attention within whole sequences."""
        return self.core_attention(projected, None, None, context)[0]

    def select(self, projected: dict[str, Tensor], context: Context, cache: LayerCache) -> EntrySet | None:
        """Append the new entries to the cache, and say which ones each query attends to; None: only the window."""
        return None

    def core_attention(
        self, projected: dict[str, Tensor], entries: Tensor | None, mask: Tensor | None, context: Context
    ) -> tuple[Tensor, Tensor | None]:
        """:func:`kernels.sparse_attention.sparse_attention` with this layer's sink and window."""
        query, window = projected["query"], self.config.window
        reach = None
        if context.documents is not None:
            reach = (context.positions + 1).clamp(max=window).expand(query.shape[:2])
        return sparse_attention(query, projected["kv"], entries, mask, self.sink, window, reach)

    def output(self, mixed: Tensor, rotation: Rotation) -> Tensor:
        """Back to [B, S, hidden] by a grouped low-rank projection (report 2.3.1)."""
        return grouped_output(mixed, *rotation, self.wo_a, self.wo_b.weight)
